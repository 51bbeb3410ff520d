"""`python -m examples.benchmarks NAME [options]`: measures, prints a table, writes JSON."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from types import ModuleType

from examples.benchmarks import (
    generation,
    head,
    iteration,
    memory,
    overhead,
    packing,
    preparation,
    refresh,
    scaling,
    step_profile,
    streams,
    training,
)
from examples.benchmarks.machine import machine

# Each has SUMMARY, `add_arguments(parser)` and `run(options)`, which prints and returns its results.
BENCHMARKS: dict[str, ModuleType] = {
    "generation": generation,
    "head": head,
    "iteration": iteration,
    "memory": memory,
    "overhead": overhead,
    "packing": packing,
    "preparation": preparation,
    "profile": step_profile,
    "refresh": refresh,
    "scaling": scaling,
    "streams": streams,
    "training": training,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, module in BENCHMARKS.items():
        command = names.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        command.add_argument("--repeats", type=int, default=3, help="runs of everything that is compared")
        command.add_argument(
            "--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of a process"
        )
        command.add_argument("--json", type=Path, default=Path("runs", "benchmarks", f"{name}.json"))
        module.add_arguments(command)
    options = parser.parse_args(arguments)
    here = machine(options.threads)
    print(
        f"{options.name}: {here['kind']}, {options.threads} threads, {here['date']}, commit {here['commit']}"
    )
    results = BENCHMARKS[options.name].run(options)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"settings": settings, "machine": here, "results": results}, indent=2)
    options.json.write_text(text + "\n", encoding="utf-8")
    print(f"written to {options.json}")


if __name__ == "__main__":
    main()
