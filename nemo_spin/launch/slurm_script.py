"""The batch script of a run: text that a person can read, and that says what they would have typed.

| the run ends with | the script |
|---|---|
| 75 (told to leave, and saved) | puts the job back into the queue; where that is off, ends with 75 |
| 76 (a node is lost, say) | the same, with 76: Slurm needs minutes to find out that a node is gone |
| the job itself (time limit, lost node) | cannot do a thing: a job that depends on it goes on |
| anything else | cancels the job that depends on it: it is done, or needs a person |

Every value is quoted for the reader it has: for the shell, and with double quotes and backslashes
for sbatch, which reads `#SBATCH` lines itself and knows no other escape. A line break cannot be in
such a line: `config/slurm_rules.py` refuses it, and names are written without. In the rest of the
script it is written as an escape, so that no value begins a line, which could look like one for sbatch.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from nemo_spin.config.schema import Config
from nemo_spin.errors import PREEMPTED, TRY_LATER

_PLAIN = re.compile(r"[\w@%+=:,./\[\]-]+", re.ASCII)

_CONTINUATION = """\
# Another job waits for this one, and goes on where it is cut off. A job that was put back into
# the queue has one already. Slurm removes it when this job ends well.
next_file={next_file}
if [[ ! -s $next_file ]]; then
    sbatch --parsable --dependency="afternotok:$job" --kill-on-invalid-dep=yes \\
        {array}-- "$script" >"$next_file" ||
        echo "no job could be submitted to go on after this one" >&2
fi
cancel_next() {{
    local next
    next=$(cut -d ';' -f 1 "$next_file" 2>/dev/null)
    if [[ -n $next ]]; then scancel "$next"; fi
    rm -f -- "$next_file"
}}

"""

_RUN = """\
# Slurm's warning comes to this shell alone; the run then saves what it has, and ends with {preempted}.
# A termination without that warning is `scancel`: nothing is to go on.
run=''
told=''
trap 'told=limit; kill -USR1 "$run" 2>/dev/null' USR1
trap 'if [[ -z $told ]]; then told=cancelled; {cancel}; fi; kill -TERM "$run" 2>/dev/null' TERM
"${{command[@]}}" &
run=$!
wait "$run"
code=$?
while kill -0 "$run" 2>/dev/null; do # a signal ends `wait`, not the run
    wait "$run"
    code=$?
done
echo "$(date '+%F %T'): the run ended with exit code $code"

"""


@dataclass(frozen=True)
class Places:
    """Where things lie that the script names.

    Attributes:
        script: The script itself.
        configurations: Resolved configurations; several are the runs of an array.
        working_directory: Relative paths in them start there.
        python: Interpreter that has this package.
    """

    script: Path
    configurations: tuple[Path, ...]
    working_directory: Path
    python: str

    @property
    def directory(self) -> Path:
        """Of the script, its configurations and its output."""
        return self.script.parent


def render(config: Config, places: Places) -> str:
    """The script.

    Args:
        config: The configuration, or that of any run of a sweep: all have the same launcher.
        places: Where what it names lies.
    """
    slurm = config.launcher.slurm
    parts = [
        "#!/usr/bin/env bash\n",
        "# Self-play fine-tuning, written by `nemo-spin slurm`; submit it with `sbatch`.\n",
        *(f"#SBATCH {line}\n" for line in _directives(config, places)),
        "# shellcheck disable=SC2016 # what stands in single quotes is meant as it stands\n",
        "set -uo pipefail\n\n",
        *_identity(config, places),
        f"cd -- {quote_for_shell(str(places.working_directory))} || exit\n",
        *(f"module load -- {quote_for_shell(module)} || exit\n" for module in slurm.modules),
        *(f"export {name}={quote_for_shell(str(value))}\n" for name, value in slurm.environment.items()),
        "\n",
        _command(places),
    ]
    if slurm.continuation:
        parts.append(_continuation(places))
    cancel = "cancel_next" if slurm.continuation else ":"
    parts += [
        _RUN.format(preempted=PREEMPTED, cancel=cancel),
        _ending(requeue=slurm.requeue, chain=slurm.continuation),
    ]
    return "".join(parts)


def _identity(config: Config, places: Places) -> list[str]:
    """The job as Slurm's commands name it (an array's first number is that of all its runs)."""
    job = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if len(places.configurations) > 1 else "$SLURM_JOB_ID"
    slurm = config.launcher.slurm
    script = [f"script={quote_for_shell(str(places.script))}\n"] if slurm.continuation else []
    return [*([f'job="{job}"\n'] if slurm.continuation or slurm.requeue else []), *script]


def _directives(config: Config, places: Places) -> list[str]:
    """Options of sbatch, without `#SBATCH`."""
    slurm, trainer = config.launcher.slurm, config.trainer
    gpus = gpus_per_node(config)
    given = {
        "job-name": _one_line(slurm.job_name or config.name),
        "account": slurm.account,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "nodes": trainer.num_nodes,
        "ntasks-per-node": trainer.devices,
        "cpus-per-task": slurm.cpus_per_task,
        "gpus-per-node": gpus or None,
        "time": slurm.time,
        "output": _output(places),
        "signal": f"B:USR1@{slurm.signal_s}",
    }
    if len(places.configurations) > 1:
        given["array"] = f"0-{len(places.configurations) - 1}"
    lines = [_directive(name, value) for name, value in given.items() if value is not None]
    lines += ["--open-mode=append", "--requeue" if slurm.requeue else "--no-requeue"]
    for option in slurm.options:
        name, has_value, value = option.removeprefix("--").partition("=")
        lines.append(_directive(name, value) if has_value else f"--{name}")
    return lines


def gpus_per_node(config: Config) -> int:
    """GPUs that are asked of each node; 0: none."""
    asked = config.launcher.slurm.gpus_per_node
    if asked is not None:
        return asked
    return 0 if config.trainer.accelerator == "cpu" else config.trainer.devices


def _directive(name: str, value: object) -> str:
    return f"--{name}={quote_for_sbatch(str(value))}"


def quote_for_shell(text: str) -> str:
    """A word of bash that is `text`, on one line."""
    if "\n" not in text and "\r" not in text:
        return shlex.quote(text)
    escapes = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r"}
    return "$'" + "".join(escapes.get(letter, letter) for letter in text) + "'"


def quote_for_sbatch(text: str) -> str:
    """A value as sbatch reads it from an `#SBATCH` line; `text` has one line."""
    if _PLAIN.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else "_" for letter in text)


def _output(places: Places) -> str | None:
    """The log's name, in which sbatch replaces %j; None where its pattern cannot hold the path."""
    path = str(places.directory)
    if not path.isprintable() or "\\" in path:  # a backslash would turn %j off
        return None
    return f"{path.replace('%', '%%')}/%j.log"


def _command(places: Places) -> str:
    words = [places.python, "-m", "nemo_spin.cli", "run", "--config"]
    command = " ".join(map(quote_for_shell, words))
    if len(places.configurations) == 1:
        return f"command=({command} {quote_for_shell(str(places.configurations[0]))})\n\n"
    listed = "".join(f"    {quote_for_shell(str(path))}\n" for path in places.configurations)
    return (
        "# The runs of the array, by number.\n"
        f"configurations=(\n{listed})\n"
        f'command=({command} "${{configurations[SLURM_ARRAY_TASK_ID]}}")\n\n'
    )


def _continuation(places: Places) -> str:
    is_array = len(places.configurations) > 1
    return _CONTINUATION.format(
        next_file=quote_for_shell(f"{places.directory}/next.") + '"$job"',
        array='--array="$SLURM_ARRAY_TASK_ID" ' if is_array else "",
    )


def _ending(*, requeue: bool, chain: bool) -> str:
    # Warned while it started, before it could listen, a run dies of the warning.
    lines = [
        f"if [[ $told == limit && $code -ne 0 && $code -ne {TRY_LATER} ]]; then code={PREEMPTED}; fi",
        f"if [[ $told != cancelled && ($code -eq {PREEMPTED} || $code -eq {TRY_LATER}) ]]; then",
    ]
    if requeue:
        lines.append("    told=requeued # what ends this script then is no `scancel`")
        lines.append('    scontrol requeue "$job" && sleep 60')
    lines += ['    exit "$code"', "fi"]
    if chain:
        lines.append("cancel_next")
    return "\n".join([*lines, 'exit "$code"']) + "\n"
