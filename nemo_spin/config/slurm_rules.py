"""What Slurm, pyxis and the shell can be told: each value of `launcher.slurm` fits its place."""

from __future__ import annotations

import re

from nemo_spin.config.mistakes import Mistake, mistake
from nemo_spin.config.schema import Config, SlurmConfig

_SECTION = "launcher.slurm"
_CHECKED = (
    *("job_name", "account", "partition", "qos", "constraint", "time", "options", "modules"),
    *("environment", "container_image", "container_mounts", "signal_s"),
)
SLURM_KEYS = (
    *(f"{_SECTION}.{name}" for name in _CHECKED),
    "launcher.name",
    "launcher.preemption_grace_s",
    "run_dir",
)
_TIME = re.compile(r"\d+|\d+:\d{1,2}|\d+:\d{1,2}:\d{1,2}|\d+-\d+(:\d{1,2}){0,2}|UNLIMITED|INFINITE")
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SECRETS = ("NEMO_SPIN_SERVER_KEY",)  # as `generation/vllm_server.py` has it
_OPTION = re.compile(r"--[a-z][\w-]*(=.*)?", re.ASCII)
# What the script says itself: given twice, the later line would win.
_OURS = frozenset(
    {"array", "chdir", "dependency", "job-name", "nodes", "ntasks", "ntasks-per-node", "open-mode"}
    | {"output", "requeue", "no-requeue", "signal", "time", "wrap", "parsable"}
)


def slurm_understands(config: Config) -> list[Mistake]:
    """Values that a line of the script, or an argument of srun, can hold."""
    slurm = config.launcher.slurm
    mistakes = [*_lines(slurm), *_times(slurm), *_options(slurm), *_variables(slurm), *_mounts(slurm)]
    mistakes += _secrets(slurm)
    return [*mistakes, *_time_to_save(config), *_run_dir(config)]


def _time_to_save(config: Config) -> list[Mistake]:
    launcher = config.launcher
    if launcher.name != "slurm" or launcher.preemption_grace_s < launcher.slurm.signal_s:
        return []
    return [
        mistake(
            "launcher.preemption_grace_s",
            found=f"{launcher.preemption_grace_s:g}, with {_SECTION}.signal_s {launcher.slurm.signal_s}",
            rule="Slurm warns a run earlier than it may need to save, in seconds",
            remedy=f"raise {_SECTION}.signal_s, or lower it",
            also=(f"{_SECTION}.signal_s",),
        )
    ]


def _lines(slurm: SlurmConfig) -> list[Mistake]:
    """An #SBATCH line ends where a line ends, whatever quotes there are."""
    given = {
        "account": slurm.account,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "container_image": slurm.container_image,
        **{f"options[{position}]": value for position, value in enumerate(slurm.options)},
        **{f"modules[{position}]": value for position, value in enumerate(slurm.modules)},
        **{f"container_mounts[{position}]": value for position, value in enumerate(slurm.container_mounts)},
    }
    return [
        mistake(
            f"{_SECTION}.{key}",
            found=repr(value),
            rule="a line of text without control characters",
            remedy="remove them",
        )
        for key, value in given.items()
        if value is not None and not value.isprintable()
    ]


def _times(slurm: SlurmConfig) -> list[Mistake]:
    if slurm.time is None or _TIME.fullmatch(slurm.time):
        return []
    return [
        mistake(
            f"{_SECTION}.time",
            found=repr(slurm.time),
            rule="minutes, hours:minutes:seconds or days-hours, as sbatch's --time",
            remedy="such as '04:00:00' (in quotes: YAML reads numbers with colons in base 60)",
        )
    ]


def _options(slurm: SlurmConfig) -> list[Mistake]:
    mistakes = []
    for option in slurm.options:
        name = option.removeprefix("--").partition("=")[0]
        if _OPTION.fullmatch(option) and name not in _OURS:
            continue
        mistakes.append(
            mistake(
                f"{_SECTION}.options",
                found=repr(option),
                rule="long options of sbatch, one in each entry, of those that no key stands for",
                remedy="such as --exclusive, --mem=0 or --reservation=NAME; nodes and tasks are "
                "trainer.num_nodes and trainer.devices",
            )
        )
    return mistakes


def _variables(slurm: SlurmConfig) -> list[Mistake]:
    return [
        mistake(
            f"{_SECTION}.environment",
            found=f"{name!r}: {value!r}",
            rule="names of variables, and texts or numbers as values",
            remedy="names have letters, digits and underscores",
        )
        for name, value in slurm.environment.items()
        if not _VARIABLE.fullmatch(name) or not isinstance(value, (str, int, float)) or "\0" in str(value)
    ]


def _secrets(slurm: SlurmConfig) -> list[Mistake]:
    """The configuration is written into the run directory, and the variables into the script."""
    return [
        mistake(
            f"{_SECTION}.environment",
            found=name,
            rule="a key is written into no file",
            remedy="take it out, and export it before the job is submitted: sbatch passes it on",
        )
        for name in _SECRETS
        if name in slurm.environment
    ]


def _run_dir(config: Config) -> list[Mistake]:
    if config.launcher.slurm.container_image is None or not set(config.run_dir) & set(",:"):
        return []
    return [
        mistake(
            "run_dir",
            found=f"{config.run_dir!r}, with {_SECTION}.container_image",
            rule="the run directory is mounted into the container: its path has no comma and no colon",
            remedy="choose another path",
            also=(f"{_SECTION}.container_image",),
        )
    ]


def _mounts(slurm: SlurmConfig) -> list[Mistake]:
    if slurm.container_mounts and slurm.container_image is None:
        return [
            mistake(
                f"{_SECTION}.container_mounts",
                found=f"{slurm.container_mounts}, with {_SECTION}.container_image null",
                rule="only a container has mounts",
                remedy=f"set {_SECTION}.container_image, or leave the mounts out",
                also=(f"{_SECTION}.container_image",),
            )
        ]
    return [
        mistake(
            f"{_SECTION}.container_mounts",
            found=repr(mount),
            rule="SOURCE:TARGET or SOURCE:TARGET:FLAGS, without commas (pyxis and Apptainer split there)",
            remedy="give each mount as an entry of its own, or a link to a directory without a comma",
        )
        for mount in slurm.container_mounts
        if "," in mount or not 1 <= mount.count(":") <= 2
    ]
