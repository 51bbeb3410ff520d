"""The command `nemo-spin`: one function per command, nothing else.

What a command needs is imported when it runs, so that help and the commands that only
look answer at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import nemo_spin
from nemo_spin.errors import NemoSpinError, PreemptedError

if TYPE_CHECKING:
    from nemo_spin.config.schema import Config

_EXAMPLE = """\
example:
  nemo-spin run --config my.yaml run_dir=runs/first spin.iterations=2 'spin.beta=[0.1,1.0]'

Exit codes: 0 done, 1 a stage failed, 2 something in the input is wrong, 3 a guard stopped the
loop (the best model so far is kept), 75 told to leave (SIGTERM or SIGUSR1 came; a training has
saved), 76 what failed may pass (a lost node, a file system that does not answer), 130 interrupted.
After 75, 76 and 130 the same command goes on.
"""
_STAGES = ("generate", "score", "train", "export", "evaluate")
_CHECKED_FOR = ("run", "prepare", "sft", *_STAGES, "import-hf")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    command = cast(Callable[[argparse.Namespace], None], options.function)
    try:
        command(options)
        sys.stdout.flush()
    except PreemptedError as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except NemoSpinError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as stopped:
        print("told to stop; the same command goes on from here", file=sys.stderr)
        return int(stopped.code or 0)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `nemo-spin status DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def run(options: argparse.Namespace) -> None:
    """All stages of all iterations, going on where an earlier start stopped."""
    from nemo_spin.launch.choice import launching
    from nemo_spin.selfplay import loop
    from nemo_spin.selfplay.screen import Screen

    config = _load(options, command="run")
    with launching(config, config.run_dir) as launcher:
        if launcher is not None:
            loop.run(config, launcher=launcher, screen=Screen())


def stage(options: argparse.Namespace) -> None:
    """One stage: prepare, generate, score, train, export, evaluate or import-hf."""
    from nemo_spin.launch.choice import launching
    from nemo_spin.selfplay import loop
    from nemo_spin.selfplay.screen import Screen

    config = _load(options, command=options.command)
    iteration = getattr(options, "iteration", None)
    with launching(config, config.run_dir) as launcher:
        if launcher is None:
            return
        loop.run_stage(config, options.command, iteration=iteration, launcher=launcher, screen=Screen())
    if getattr(options, "to", None) is not None:
        from nemo_spin.selfplay.official import write_official

        output = Path(options.output).expanduser().absolute() if options.output else None
        print("\n".join(map(str, write_official(config, output))))


def sft(options: argparse.Namespace) -> None:
    """Plain fine-tuning on the demonstrations."""
    from nemo_spin.launch.choice import launching
    from nemo_spin.selfplay import loop
    from nemo_spin.selfplay.screen import Screen

    config = _load(options, command="sft")
    with launching(config, config.sft.output) as launcher:
        if launcher is not None:
            loop.run_sft(config, launcher=launcher, screen=Screen())


def slurm(options: argparse.Namespace) -> None:
    """The batch script of a run: written into run_dir, shown, or submitted."""
    from nemo_spin.launch import submit

    submission = submit.compose(options.config, options.overrides, options.sweep)
    if options.dry_run:
        print(submission.text, end="")
        return
    script = submission.write()
    print(
        submit.submit(script)
        if options.submit
        else f"{script}\nsubmit it with: {shlex.join(['sbatch', str(script)])}"
    )


def status(options: argparse.Namespace) -> None:
    """What is done in a run directory, what is running, and how long it took."""
    from nemo_spin.selfplay.status import describe

    print(describe(Path(options.run_dir)))


def report(options: argparse.Namespace) -> None:
    """One HTML file to look at a run, or at several side by side; needs no network."""
    from nemo_spin.selfplay import reporting

    path = reporting.report(options.run_dirs, output=options.output, num_samples=options.samples)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


def plan(options: argparse.Namespace) -> None:
    """What a model needs on a cluster: memory, the fastest layout that fits, times; starts nothing."""
    from nemo_spin.selfplay.planning import command
    from nemo_spin.selfplay.planning.request import Lengths

    made = command.plan(
        options.config,
        options.overrides,
        model=options.model,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        gpu=options.gpu,
        pairs=options.pairs,
        lengths=Lengths(options.prompt_tokens, options.real_tokens, options.generated_tokens),
    )
    print(command.written(made, as_data=options.json))


def doctor(options: argparse.Namespace) -> None:
    """What this machine has for a run, or with --model whether a model is supported."""
    if options.model is not None:
        from nemo_spin.selfplay.doctor.model import examine_model

        print("\n".join(examine_model(Path(options.model))))
        return
    from nemo_spin.config.load import load_config
    from nemo_spin.selfplay.doctor import command

    config = load_config(options.config, options.overrides)
    findings = command.examine(config, quick=options.quick)
    print(command.written(findings, as_data=options.json))
    command.refuse_errors(findings)


def validate_config(options: argparse.Namespace) -> None:
    """Prints the resolved configuration, or everything that is wrong with it."""
    from nemo_spin.config.load import to_yaml

    print(to_yaml(_load(options, command=options.command_to_check)), end="")


def _load(options: argparse.Namespace, *, command: str) -> Config:
    from nemo_spin.config.load import load_config

    return load_config(options.config, options.overrides, command=command)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options may stand between the overrides; whatever is unknown is an error."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemo-spin",
        description="Self-play fine-tuning (SPIN) of language models at Megatron scale.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nemo-spin {nemo_spin.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add(commands, "run", run, "everything: prepare, then generate, score, train, export, evaluate")
    prepared = _add(commands, "prepare", stage, "demonstrations to token ids, once")
    prepared.add_argument(
        "--to", choices=("spin-parquet",), help="also write data and answers as uclaml/SPIN reads them"
    )
    prepared.add_argument("--output", metavar="DIR", help="of --to; default: spin-parquet in run_dir")
    _add(commands, "sft", sft, "plain fine-tuning on the demonstrations, into sft.output")
    for name, text in zip(
        _STAGES,
        (
            "the opponent answers the training prompts",
            "the opponent's log-probabilities of both responses",
            "the policy learns to tell them apart",
            "the policy as a Hugging Face directory",
            "held-out metrics and scores",
        ),
        strict=True,
    ):
        added = _add(commands, name, stage, text)
        added.add_argument(
            "--iteration", type=_number, metavar="N", help="from 0; without it, the first that is not done"
        )
    _add(commands, "import-hf", stage, "model.path as a Megatron distributed checkpoint")
    checked = _add(commands, "validate-config", validate_config, "print the resolved configuration")
    checked.add_argument(
        "--for",
        dest="command_to_check",
        choices=_CHECKED_FOR,
        default="run",
        help="the command to use it with",
    )
    _add_plan(commands)
    _add_slurm(commands)
    _add_doctor(commands)
    shown = commands.add_parser("status", help="what is done in a run directory", description=status.__doc__)
    shown.add_argument("run_dir", metavar="RUN_DIR")
    shown.set_defaults(function=status)
    reported = commands.add_parser(
        "report", help="one HTML file of a run, or of several side by side", description=report.__doc__
    )
    reported.add_argument("run_dirs", metavar="RUN_DIR", nargs="+")
    reported.add_argument(
        "--output", metavar="FILE", help="default: report.html in RUN_DIR; for several ./comparison.html"
    )
    reported.add_argument(
        "--samples", type=_number, metavar="N", help="prompts with texts, for each run (default: 1000)"
    )
    reported.set_defaults(function=report)
    return parser


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    asked = _add(commands, "doctor", doctor, "what this machine has, or whether a model is supported")
    asked.add_argument(
        "--model", metavar="PATH", help="look at this Hugging Face directory, and at nothing else"
    )
    asked.add_argument("--quick", action="store_true", help="write no file and start no ranks")
    asked.add_argument("--json", action="store_true", help="findings as a list, for scripts")


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    planned = _add(commands, "plan", plan, "memory, layouts and times of a model on a cluster")
    planned.add_argument("--model", metavar="PATH", help="directory, config.json or hub id (model.path)")
    planned.add_argument("--nodes", type=_number, metavar="N", help="default: trainer.num_nodes")
    planned.add_argument("--gpus-per-node", type=_number, metavar="G", help="default: trainer.devices")
    planned.add_argument(
        "--gpu", default="H100", metavar="KIND", help="such as H200, A100-80 or H100,memory_gib=94 (H100)"
    )
    planned.add_argument("--pairs", type=_number, default=50_000, metavar="N", help="an iteration's (50000)")
    for what, limit in (
        ("prompt", "a quarter of data.max_prompt_length"),
        ("real", "a quarter of data.max_response_length"),
        ("generated", "half of generation.max_tokens"),
    ):
        planned.add_argument(
            f"--{what}-tokens", type=float, metavar="MEAN", help=f"on average; default: {limit}"
        )
    planned.add_argument("--json", action="store_true", help="bytes and seconds, for scripts")


def _add_slurm(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    submitted = _add(
        commands, "slurm", slurm, "a batch script of `run` for Slurm, from conf/launcher/slurm.yaml"
    )
    ways = submitted.add_mutually_exclusive_group()
    ways.add_argument("--dry-run", action="store_true", help="show the script, write nothing")
    ways.add_argument("--submit", action="store_true", help="write it into run_dir/slurm and submit it")
    submitted.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="an array with a run for each value, or for each combination of several --sweep",
    )


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    function: Callable[[argparse.Namespace], None],
    text: str,
) -> argparse.ArgumentParser:
    """A command that takes a configuration."""
    parser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )
    parser.add_argument(
        "--config", metavar="NAME_OR_PATH", help="a name in conf/ or a YAML file (default: spin)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set configuration keys")
    parser.set_defaults(function=function)
    return parser


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
