"""prepare: demonstrations to token ids, once for all iterations."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_spin.data.files import Manifest
from nemo_spin.data.inputs import prepare_inputs
from nemo_spin.data.overlong import RowLimit
from nemo_spin.data.prepare import prepare
from nemo_spin.data.progress import Progress
from nemo_spin.data.worth_knowing import length_note
from nemo_spin.selfplay.stages.stage import Context, Stage


class PrepareStage(Stage):
    """Runs in this process (with tokenizing workers of its own).

    Args:
        context: See `Context`.
        generates: Whether answers are generated for the prompts and trained on.
    """

    name = "prepare"
    key_prefix = "data."

    def __init__(self, context: Context, *, generates: bool = True) -> None:
        super().__init__(context)
        self._generates = generates

    @property
    def directory(self) -> Path:
        """See `Stage`."""
        return self.context.run.data_dir

    @property
    def logs(self) -> Path:
        """See `Stage`."""
        return self.context.run.logs

    def settings(self) -> dict[str, Any]:
        """Listed by `data/inputs.py`."""
        return dict(self._inputs["config"])

    def consumes(self) -> dict[str, Any]:
        """The demonstrations and the tokenizer, by their contents."""
        return {key: value for key, value in self._inputs.items() if key != "config"}

    @cached_property  # it hashes the demonstrations
    def _inputs(self) -> dict[str, Any]:
        return prepare_inputs(self.context.config.data, self.context.theta_0)

    def run(self, progress: Progress) -> None:
        """See `Stage`."""
        manifest = prepare(
            self.context.config.data,
            tokenizer_dir=self.context.theta_0,
            out_dir=self.directory,
            row_limit=self._row_limit(),
            progress=progress,
        )
        note = length_note(manifest.counts, max_tokens=self.context.config.generation.max_tokens)
        if self._generates and note is not None:
            progress.note(note)

    def _row_limit(self) -> RowLimit | None:
        model, generation = self.context.config.model, self.context.config.generation
        if model.packing == "none":
            return None
        return RowLimit(
            packing=model.packing,
            micro_batch_tokens=model.micro_batch_tokens,
            num_generations=generation.num_generations if self._generates else 0,
            max_tokens=generation.max_tokens,
        )

    def describe(self, manifest: Manifest) -> str:
        """See `Stage`."""
        parts = []
        for split in ("train", "heldout"):
            counts = manifest.counts.get(split)
            if counts:
                tokens = counts["prompt_tokens"] + counts["real_tokens"]
                refused = f", {counts['quarantined']:,} refused" if counts["quarantined"] else ""
                overlong = counts.get("overlong", {}).get("possible", 0)
                above = f", {overlong:,} may exceed model.micro_batch_tokens" if overlong else ""
                shared = counts.get("also_in_train", 0)
                known = f", {shared:,} of their prompts in train too" if shared else ""
                parts.append(f"{counts['rows']:,} {split} rows, {tokens:,} tokens{refused}{above}{known}")
        return "; ".join(parts)
