"""Which launcher a configuration asks for."""

from __future__ import annotations

from nemo_spin.config.schema import Config
from nemo_spin.launch.local import LocalLauncher
from nemo_spin.selfplay.launcher import Launcher


def launcher_of(config: Config) -> Launcher:
    """The launcher that `launcher.name` names.

    Raises:
        ConfigError: This process is not where that launcher works.
    """
    match config.launcher.name:
        case "slurm":
            from nemo_spin.launch.slurm import SlurmLauncher

            return SlurmLauncher(config)
        case name:
            assert name == "local", f"a launcher {name!r} passed validation"
            return LocalLauncher()
