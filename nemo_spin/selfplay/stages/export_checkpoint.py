"""`nemo-spin export export.checkpoint=...`: a checkpoint that is no iteration's."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from nemo_spin.data.files import MANIFEST_NAME, write_json
from nemo_spin.data.progress import Progress
from nemo_spin.errors import ConfigError, explain
from nemo_spin.selfplay.lock import locked
from nemo_spin.selfplay.stages.export import ExportStage
from nemo_spin.selfplay.stages.opponent import link_opponent, weights_of


class ExportCheckpointStage(ExportStage):
    """A Megatron distributed checkpoint as a Hugging Face directory.

    It may come from elsewhere: `import-hf`, Megatron-LM. `model.path` says what model it is,
    and gives configuration, tokenizer and chat template.
    """

    name = "export-checkpoint"
    of_the_loop = False

    @property
    def directory(self) -> Path:
        """`export.output`."""
        return Path(self.context.config.export.output).expanduser().absolute()

    @property
    def checkpoint(self) -> Path:
        """`export.checkpoint`."""
        return Path(self.context.config.export.checkpoint or "").expanduser().absolute()

    def consumes(self) -> dict[str, Any]:
        """The model's description, and the checkpoint's files by name, size and time."""
        return {
            "model": weights_of(self.context, self.context.theta_0),
            "checkpoint": _fingerprint(self.checkpoint),
        }

    def check(self) -> None:
        """See `Stage`.

        Raises:
            ConfigError: The checkpoint is none, or something else lies where the result goes.
        """
        if not any(self.checkpoint.glob("**/metadata.json")):
            raise ConfigError(
                explain(
                    f"export.checkpoint={self.checkpoint}",
                    found="holds no metadata.json",
                    rule="a Megatron distributed checkpoint, or a directory of them",
                    remedy="name the directory that `import-hf`, a training or Megatron-LM wrote",
                )
            )
        there = self.directory
        is_export = (there / MANIFEST_NAME).is_file()
        if there.exists() and not is_export and (not there.is_dir() or any(there.iterdir())):
            raise ConfigError(
                explain(
                    f"export.output={there}",
                    found="is there, and no export",
                    rule="an export goes to a new directory, or goes on with its own",
                    remedy="choose another directory, or remove this one",
                )
            )

    def prepare_directory(self, inputs: dict[str, Any]) -> None:
        """See `Stage`; around a directory that is not the run's, nothing is tidied up."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self.progress_path.unlink(missing_ok=True)
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.inputs_path, inputs)

    def run(self, progress: Progress) -> None:
        """See `Stage`. Of two writers the second is refused."""
        link_opponent(self.context, None)
        name = self.directory.name
        with locked(self.directory.with_name(f".{name}.lock"), on_wait=progress.note):
            for partial in self.directory.parent.glob(f".{name}.*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
            self.launch(progress)


def _fingerprint(directory: Path) -> str:
    """Hash of names, sizes and times: a checkpoint may hold terabytes."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            status = path.stat()
            name = path.relative_to(directory).as_posix()
            digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
