"""Where everything of a run lies. No other file spells these names.

```
RUN_DIR/
  config.yaml            the resolved configuration
  state.json             iteration, stage, attempts, seconds; for people and `status`
  run.lock               who is working here
  data/                  prepare
  logs/                  of prepare
  report.html            what there is so far, to look at
  kept                   link to the model that selfplay.keep chose
  iter_00/
    opponent             link to the Hugging Face directory of theta_t
    opponent_evaluation/ iteration 0 only: how theta_0 answers held-out prompts
    generated/  scored/  train/  model/  evaluation/
    adapter/             with LoRA, if asked for: theta_{t+1} - theta_0, as `peft` writes it
    evaluation.json      the numbers of evaluation/ (opponent_evaluation.json likewise)
    canary.json          what Megatron says about a few texts under theta_{t+1}, to check a sampler with
    metrics.jsonl        one line for each optimizer step, and for each engine that answered
    guards.json          the guards that fired
    logs/                of every stage of the iteration
```
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_ITERATION = re.compile(r"iter_(\d{2,})")


@dataclass(frozen=True)
class IterationDirectory:
    """The files of one iteration: from the opponent theta_t to theta_{t+1}.

    Plain fine-tuning (`nemo-spin sft`) has the same layout without an iteration: there
    `path` is the run directory itself and `opponent` the model it starts from.
    """

    path: Path

    @property
    def opponent(self) -> Path:
        """Hugging Face directory of theta_t (a link)."""
        return self.path / "opponent"

    @property
    def generated(self) -> Path:
        """The opponent's answers."""
        return self.path / "generated"

    @property
    def scored(self) -> Path:
        """The answers and demonstrations with the opponent's log-probabilities."""
        return self.path / "scored"

    @property
    def base(self) -> Path:
        """The same for the opponent's own answers under theta_0, where `spin.opponent_mix` needs it.

        In iteration 0 the opponent is theta_0.
        """
        return self.scored if self.path.name == "iter_00" else self.scored / "base"

    @property
    def train(self) -> Path:
        """Megatron checkpoints and TensorBoard files."""
        return self.path / "train"

    @property
    def model(self) -> Path:
        """Hugging Face directory of theta_{t+1}."""
        return self.path / "model"

    @property
    def canary_path(self) -> Path:
        """Log-probabilities of a few texts under theta_{t+1} (`generation/canary.py`)."""
        return self.path / "canary.json"

    @property
    def adapter(self) -> Path:
        """What LoRA trained in this iteration and those before, for `peft` and vLLM, beside theta_0."""
        return self.path / "adapter"

    @property
    def evaluation(self) -> Path:
        """theta_{t+1}'s answers to held-out prompts, and their scores."""
        return self.path / "evaluation"

    @property
    def opponent_evaluation(self) -> Path:
        """The same for theta_t; made in iteration 0 only, for theta_0."""
        return self.path / "opponent_evaluation"

    @property
    def evaluation_path(self) -> Path:
        """The numbers of `evaluation`, beside it."""
        return self.path / "evaluation.json"

    @property
    def opponent_evaluation_path(self) -> Path:
        """The numbers of `opponent_evaluation`, beside it."""
        return self.path / "opponent_evaluation.json"

    @property
    def metrics_path(self) -> Path:
        """JSON lines: one for each optimizer step, the held-out metrics, and how engines were opened."""
        return self.path / "metrics.jsonl"

    @property
    def guards_path(self) -> Path:
        """Stage -> the guards that fired."""
        return self.path / "guards.json"

    @property
    def logs(self) -> Path:
        """Logs and progress files of the stages."""
        return self.path / "logs"


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory; nothing needs to exist."""

    path: Path

    @property
    def config_path(self) -> Path:
        """The resolved configuration of the last start."""
        return self.path / "config.yaml"

    @property
    def state_path(self) -> Path:
        """What is being done and how long everything took (`selfplay/state.py`)."""
        return self.path / "state.json"

    @property
    def lock_path(self) -> Path:
        """Who is working here (`selfplay/lock.py`)."""
        return self.path / "run.lock"

    @property
    def verified_path(self) -> Path:
        """Which files were hashed and have not been touched since (`selfplay/verified.py`)."""
        return self.path / ".verified.json"

    @property
    def data_dir(self) -> Path:
        """The prepared demonstrations."""
        return self.path / "data"

    @property
    def report_path(self) -> Path:
        """Everything above in one HTML file, for people."""
        return self.path / "report.html"

    @property
    def kept(self) -> Path:
        """Link to the model that `selfplay.keep` chose."""
        return self.path / "kept"

    @property
    def imported_dir(self) -> Path:
        """The Megatron checkpoint that `nemo-spin import-hf` writes."""
        return self.path / "imported"

    @property
    def logs(self) -> Path:
        """Logs of what belongs to no iteration."""
        return self.path / "logs"

    def iteration(self, iteration: int) -> IterationDirectory:
        """The directory of iteration `iteration`, from 0."""
        return IterationDirectory(self.path / f"iter_{iteration:02d}")

    @property
    def sft(self) -> IterationDirectory:
        """The same files, right in the run directory, for plain fine-tuning."""
        return IterationDirectory(self.path)

    def at(self, iteration: int | None) -> IterationDirectory:
        """`iteration(iteration)`, or `sft` where there is none."""
        return self.sft if iteration is None else self.iteration(iteration)

    def existing_iterations(self) -> list[int]:
        """The iterations that have a directory, in order."""
        found = (_ITERATION.fullmatch(entry.name) for entry in self.path.glob("iter_*"))
        return sorted(int(match[1]) for match in found if match)
