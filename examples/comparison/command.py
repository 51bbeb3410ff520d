"""The command: self-play beside what it has to be compared with.

Not in `__main__`: processes that are spawned look up what they have to run, and find nothing there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from examples.benchmarks.machine import machine
from examples.comparison.arms import Row, run_arms
from examples.comparison.plan import SEARCH, SEARCH_SEED, SEEDS, TABLE
from examples.comparison.plot import write_plot
from examples.comparison.table import compared, tables
from examples.comparison.world import SIZES, SMALL, SMALL_OVERRIDES, make_base, world

PLANS = {"table": TABLE, "search": SEARCH}
RESULTS = Path(__file__).parent / "results"


def run_seed(plan: str, seed: int, out: Path, small: bool) -> list[Row]:
    """All rows of a seed; each arm is kept as soon as it is done, and not run again."""
    torch.set_num_threads(1)
    path = out / f"{plan}-{seed}.jsonl"
    rows = _read(path)
    here = world(seed, out / "base", *sizes_of(small))
    with path.open("a", encoding="utf-8") as stream:
        for regime, arms in PLANS[plan]:
            done = [row for row in rows if row["regime"] == regime.name]
            for row in run_arms(here, regime, arms, done):
                print(f"seed {seed}: {regime.name}: {row['arm']}: {row['sampled']['1.0']:.3f}", flush=True)
                stream.write(json.dumps(row) + "\n")
                stream.flush()
    return in_order(_read(path), plan)


def sizes_of(small: bool) -> tuple[dict[str, int], tuple[str, ...]]:
    """Sizes of the data, and what is different in all configurations."""
    return (SMALL, SMALL_OVERRIDES) if small else (SIZES, ())


def in_order(rows: list[Row], plan: str) -> list[Row]:
    """The rows of the plan's arms, as the plan has them."""
    order = [(regime.name, arm.name) for regime, arms in PLANS[plan] for arm in arms]
    known = [row for row in rows if (row["regime"], row["arm"]) in order]
    return sorted(known, key=lambda row: order.index((row["regime"], row["arm"])))


def _read(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def read_results(path: Path) -> list[Row]:
    """The rows of a file that `write` wrote."""
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def write(path: Path, plan: str, rows: list[Row], seconds: float | None) -> None:
    """Everything about a run; a line for each row of results.

    Args:
        path: JSON file.
        plan: Its name.
        rows: Of all seeds.
        seconds: What it took in one go; None: in pieces.
    """
    plan_of = [
        {"regime": asdict(regime), "arms": [asdict(arm) for arm in arms]} for regime, arms in PLANS[plan]
    ]
    about = {"machine": machine(threads=1), "seconds": seconds and round(seconds), "plan": plan_of}
    head = json.dumps(about, indent=1)[:-2]
    body = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.write_text(f'{head},\n "rows": [\n{body}\n ]\n}}\n', encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Runs what is not done yet, prints tables, writes JSON."""
    about = "The table, the search that found its settings, or both as they lie in results/."
    parser = argparse.ArgumentParser(prog="python -m examples.comparison", description=about)
    parser.add_argument("plan", nargs="?", choices=[*PLANS, "show"], default="table")
    parser.add_argument("--out", type=Path, help="default: runs/comparison, or runs/comparison-small")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="default: the reported ones, or that of the search"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="seeds side by side")
    parser.add_argument("--small", action="store_true", help="a handful of rows, to see it work")
    options = parser.parse_args(arguments)
    if options.plan == "show":
        for plan in PLANS:
            rows = read_results(RESULTS / f"{plan}.json")
            print(f"# {plan}\n\n{tables(rows, whole=plan == 'table')}\n")
        return
    out = options.out or Path("runs", "comparison-small" if options.small else "comparison")
    started = None if out.exists() else time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    make_base(out / "base", *sizes_of(options.small))
    seeds = options.seeds or (SEEDS if options.plan == "table" else (SEARCH_SEED,))
    jobs = [(options.plan, seed, out, options.small) for seed in seeds]
    if min(options.jobs, len(seeds)) == 1:
        found = [run_seed(*job) for job in jobs]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            found = list(pool.map(run_seed, *zip(*jobs, strict=True)))
    rows = [row for each in found for row in each]
    seconds = None if started is None else time.monotonic() - started
    path = out / f"{options.plan}.json"
    write(path, options.plan, rows, seconds)
    print(f"\n{tables(rows, whole=options.plan == 'table')}\n\nwritten to {path}")
    if options.plan == "table":
        write_plot(path.with_suffix(".svg"), rows)
    if not options.small:
        print(compared(rows, read_results(RESULTS / path.name)))
    if seconds is not None:
        print(f"in {seconds / 60:.0f} minutes")
