"""Which launcher a configuration asks for, and what this process is in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from nemo_spin.config.schema import Config
from nemo_spin.errors import NemoSpinError, StageError
from nemo_spin.launch.local import LocalLauncher
from nemo_spin.selfplay.launcher import Launcher


@contextlib.contextmanager
def launching(config: Config, run_dir: str) -> Iterator[Launcher | None]:
    """The launcher that `launcher.name` names, for as long as the command runs.

    With `external`, all but one of the processes only follow that one: for them there is no
    launcher, and the command has ended when this gives None.

    Args:
        config: The configuration.
        run_dir: The run directory of the command.

    Raises:
        NemoSpinError: This process is not where that launcher works; or it followed a command
            that failed.
    """
    match config.launcher.name:
        case "slurm":
            from nemo_spin.launch.slurm import SlurmLauncher

            yield SlurmLauncher(config)
        case "external":
            yield from _externally(config, Path(run_dir).expanduser().absolute())
        case name:
            assert name == "local", f"a launcher {name!r} passed validation"
            yield LocalLauncher()


def _externally(config: Config, run_dir: Path) -> Iterator[Launcher | None]:
    from nemo_spin.launch.external import ExternalLauncher, checked_place
    from nemo_spin.launch.follower import follow_first_rank

    place = checked_place(config, os.environ)
    if place.rank != 0:
        code = follow_first_rank(config, run_dir, place)
        if code != 0:
            failed = StageError(f"rank 0 ended with exit code {code}; why is on its screen")
            failed.exit_code = code
            raise failed
        yield None
        return
    launcher = ExternalLauncher(config, run_dir)
    code = 1
    try:
        launcher.await_all()  # before a stage without ranks takes hours
        yield launcher
        code = 0
    except NemoSpinError as error:
        code = error.exit_code
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    except SystemExit as stopped:
        code = int(stopped.code or 0)
        raise
    finally:
        launcher.close(code)
