"""Self-play started by nemo-run: on this machine, or as a Slurm job with its executor.

    python examples/nemo_run_spin.py --config my.yaml spin.iterations=2
    python examples/nemo_run_spin.py --executor slurm --account my-lab --nodes 2 --gpus-per-node 8 \
        --container-image registry#image:tag --mount /data:/data --config /data/my.yaml
    python examples/nemo_run_spin.py --dry-run …      shows what would be started

Needs `pip install nemo-run "leptonai<0.28"` (the extra `nemo-run`). On Slurm nemo-run starts a task for
each GPU, all with the same `nemo-spin` command: `launcher=external` makes ranks of them. Where you have
no nemo-run, `nemo-spin slurm` writes a job of its own, which also goes on after its time limit.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import nemo_run


def command(options: argparse.Namespace) -> list[str]:
    """Arguments of `nemo-spin`."""
    words = ["run"]
    if options.config is not None:
        path = Path(options.config)
        words += ["--config", str(path.absolute()) if path.suffix == ".yaml" else options.config]
    words += [f"trainer.devices={options.gpus_per_node}", f"trainer.num_nodes={options.nodes}"]
    if options.executor == "slurm":
        words.append("launcher=external")
    return [*words, *options.overrides]


def executor(options: argparse.Namespace) -> nemo_run.Executor:
    """Where it runs."""
    import nemo_run

    if options.executor == "local":
        return nemo_run.LocalExecutor(ntasks_per_node=1)  # `nemo-spin run` starts the ranks itself
    return nemo_run.SlurmExecutor(
        account=options.account,
        partition=options.partition,
        time=options.time,
        nodes=options.nodes,
        ntasks_per_node=options.gpus_per_node,
        gpus_per_node=options.gpus_per_node,
        container_image=options.container_image,
        container_mounts=options.mount,
        signal="USR1@300",  # to every task: a training saves before the time limit
        tunnel=nemo_run.LocalTunnel(job_dir=str(Path(options.job_dir).absolute())),
        packager=nemo_run.Packager(),  # the image has nemo_spin
    )


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--executor", choices=("local", "slurm"), default="local")
    parser.add_argument("--config", metavar="NAME_OR_PATH")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=1)
    parser.add_argument("--account", default="")
    parser.add_argument("--partition")
    parser.add_argument("--time", default="04:00:00")
    parser.add_argument("--container-image")
    parser.add_argument("--mount", action="append", default=[], metavar="SOURCE:TARGET")
    parser.add_argument("--python", default="python", help="with nemo_spin; in the image, on Slurm")
    parser.add_argument("--job-dir", default="runs/nemo_run", help="nemo-run's own files, on shared storage")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> None:
    """Starts the run, or shows what would be started."""
    options = parsed(arguments)
    import nemo_run

    words = command(options)
    if options.executor == "slurm":  # there nemo-run puts them into a script as they are
        words = [shlex.quote(word) for word in words]
    task = nemo_run.Script(path="nemo_spin.cli", m=True, entrypoint=options.python, args=words)
    with nemo_run.Experiment("nemo-spin") as experiment:
        experiment.add(task, executor=executor(options), name="spin")
        if options.dry_run:
            experiment.dryrun()
        else:
            experiment.run(detach=options.executor == "slurm", tail_logs=options.executor == "local")


if __name__ == "__main__":
    main(sys.argv[1:])
