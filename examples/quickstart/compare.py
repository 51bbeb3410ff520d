"""Prints how often every model of the quickstart answers right, as measured.

Usage: `python compare.py OUT_DIR` prints the table and writes `OUT_DIR/comparison.json`;
`--steps` prints the optimizer steps of all iterations of self-play instead.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One model; None where something was not measured.

    Attributes:
        model: Its name.
        steps: Optimizer steps since theta_0.
        sampled: Share of right answers when sampling.
        greedy: Share of right answers when always the likeliest token is taken.
    """

    model: str
    steps: int
    sampled: float | None
    greedy: float | None


def read(path: Path) -> dict[str, Any]:
    """A JSON object."""
    found = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict), f"{path} holds no JSON object"
    return found


def row(model: str, steps: int, evaluation: Path) -> Row:
    """A model and what its evaluation found."""
    numbers = read(evaluation / "evaluation.json")
    scores = {way: numbers.get(way, {}).get("score") for way in ("sampled", "greedy")}
    return Row(model, steps, **scores)


def steps_of(iteration: Path) -> int:
    """Optimizer steps of one iteration."""
    return int(read(iteration / "train" / "manifest.json")["counts"]["steps"])


def rows(out_dir: Path) -> list[Row]:
    """All models, in the order of the quickstart."""
    iterations = sorted((out_dir / "spin").glob("iter_*"))
    cooler = out_dir / "theta_0" / "evaluated_cooler" / "iter_00"
    table = [
        row("theta_0", 0, iterations[0] / "opponent_evaluation"),
        row("theta_0 at temperature 0.5", 0, cooler / "opponent_evaluation"),
    ]
    steps = 0
    for number, iteration in enumerate(iterations, start=1):
        steps += steps_of(iteration)
        table.append(row(f"theta_{number} (self-play)", steps, iteration / "evaluation"))
    continued = out_dir / "continued_sft" / "evaluated" / "iter_00"
    table.append(row("continued fine-tuning", steps, continued / "opponent_evaluation"))
    return table


def main() -> None:
    """Prints the table, or the number of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--steps", action="store_true", help="print the steps of self-play only")
    arguments = parser.parse_args()
    if arguments.steps:
        print(sum(steps_of(iteration) for iteration in (arguments.out_dir / "spin").glob("iter_*")))
        return

    table = rows(arguments.out_dir)
    result = arguments.out_dir / "comparison.json"
    result.write_text(json.dumps([asdict(entry) for entry in table], indent=2) + "\n", encoding="utf-8")
    print("Share of right answers to held-out prompts:\n")
    print(f"{'model':<28}{'steps':>7}{'sampled':>10}{'greedy':>10}")
    for entry in table:
        scores = ("–" if score is None else f"{score:.3f}" for score in (entry.sampled, entry.greedy))
        print(f"{entry.model:<28}{entry.steps:>7}" + "".join(f"{score:>10}" for score in scores))
    print(f"\nThese numbers: {result}")
    print(f"Everything else of the run: {arguments.out_dir / 'spin'}")


if __name__ == "__main__":
    main()
