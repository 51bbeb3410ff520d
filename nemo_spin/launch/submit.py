"""`nemo-spin slurm`: writes a run's batch script, shows it, or hands it to sbatch.

What is submitted is the configuration as it is now, resolved and beside the script: a job that
goes on days later does not read a file that someone is editing.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_spin.config.load import load_config, to_yaml
from nemo_spin.config.schema import Config
from nemo_spin.data.files import write_text
from nemo_spin.errors import ConfigError, StageError, explain
from nemo_spin.launch.slurm_script import Places, render
from nemo_spin.selfplay.storage import storage_error

_SUBMIT_S = 120.0  # a busy controller may take long to answer
_SWEEP = re.compile(r"([A-Za-z_][\w./]*)=(.+)", re.DOTALL)


@dataclass(frozen=True)
class Submission:
    """A script and what it starts.

    Attributes:
        text: The script.
        places: Where it and its configurations belong.
        configs: One for each run.
    """

    text: str
    places: Places
    configs: tuple[Config, ...]

    def write(self) -> Path:
        """Writes script and configurations; returns the script's path.

        Raises:
            DataError: They cannot be written.
        """
        try:
            for path, config in zip(self.places.configurations, self.configs, strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, to_yaml(config))
            self.places.directory.mkdir(parents=True, exist_ok=True)
            write_text(self.places.script, self.text)
        except OSError as error:
            raise storage_error(self.places.directory, error) from error
        return self.places.script


def compose(source: str | None, overrides: Sequence[str], sweeps: Sequence[str]) -> Submission:
    """What is to be submitted; writes nothing.

    Args:
        source: As for `load_config`.
        overrides: Likewise. The launcher is slurm, whatever they say before.
        sweeps: `key=value,value`; several are combined, each combination a run of its own in a
            directory below `run_dir`.

    Raises:
        ConfigError: A configuration of one of the runs cannot be used.
    """
    launched = ["launcher=slurm", *overrides]
    base = load_config(source, launched, command="run")
    directory = Path(base.run_dir).expanduser().absolute()
    configs, paths = [], []
    for number, combination in enumerate(combinations(sweeps)):
        run_dir = directory / run_name(number, combination) if combination else directory
        config = load_config(source, [*launched, *combination], command="run") if combination else base
        config.run_dir = str(run_dir)
        configs.append(config)
        paths.append(run_dir / "slurm" / "config.yaml")
    _refuse_other_launchers(configs)
    places = Places(
        script=directory / "slurm" / "job.sh",
        configurations=tuple(paths),
        working_directory=Path.cwd(),
        python=sys.executable,
    )
    return Submission(render(configs[0], places), places, tuple(configs))


def submit(script: Path) -> str:
    """Hands a script to sbatch; returns what sbatch says, such as `Submitted batch job 17`.

    Raises:
        StageError: sbatch is not there, or refuses.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--", str(script)], capture_output=True, text=True, timeout=_SUBMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _refused(script, str(error)) from error
    if done.returncode != 0:
        raise _refused(script, done.stderr.strip() or f"exit code {done.returncode}")
    return done.stdout.strip()


def combinations(sweeps: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of the values, as overrides; one empty combination where nothing is swept.

    Raises:
        ConfigError: A sweep has no key, or no values.
    """
    choices = []
    for sweep in sweeps:
        match = _SWEEP.fullmatch(sweep)
        values = _split(match[2]) if match else []
        if match is None or not all(values):
            raise ConfigError(
                explain(
                    f"--sweep {sweep}",
                    found="is no key with values",
                    rule="a key and its values, parted by commas outside of brackets and quotes",
                    remedy="such as --sweep spin.beta=0.1,1.0 or --sweep 'spin.lr=[5e-7,1e-7],[1e-6,5e-7]'",
                )
            )
        choices.append([f"{match[1]}={value}" for value in values])
    return list(itertools.product(*choices))


def run_name(number: int, combination: Sequence[str]) -> str:
    """Directory of one run of a sweep: its number, and what is its own as far as a name can say it."""
    told = re.sub(r"[^\w.=,+-]+", "_", ",".join(combination), flags=re.ASCII)
    return f"{number:03d}-{told}"[:120]


def _split(text: str) -> list[str]:
    """The parts between commas that stand outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return parts


def _refuse_other_launchers(configs: Sequence[Config]) -> None:
    """All runs of an array share one job description."""
    for config in configs:
        if config.launcher.name != "slurm":
            raise ConfigError(
                explain(
                    "launcher.name",
                    found=config.launcher.name,
                    rule="`nemo-spin slurm` writes jobs of the launcher slurm",
                    remedy="leave launcher.name out, or start `nemo-spin run` in a script of your own",
                )
            )
        same_nodes = config.trainer.num_nodes == configs[0].trainer.num_nodes
        if config.launcher != configs[0].launcher or not same_nodes:
            raise ConfigError(
                explain(
                    "--sweep",
                    found="launcher.* or trainer.num_nodes differ between runs",
                    rule="the runs of an array are jobs of the same size",
                    remedy="submit them one by one",
                )
            )


def _refused(script: Path, reason: str) -> StageError:
    return StageError(
        explain(
            f"sbatch {script}",
            found=reason,
            rule="the script is submitted on a machine with Slurm's commands, to a cluster that takes it",
            remedy="the script is written: mend what is wrong, or submit it where the cluster takes jobs",
        )
    )
