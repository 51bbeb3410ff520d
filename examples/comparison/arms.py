"""The arms of the comparison, and what is measured of every model that they lead to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from examples.comparison.player import exact_matches, sample
from examples.comparison.training import fine_tuned, self_play
from examples.comparison.world import Regime, World
from nemo_spin.data.datasets import REAL_ONLY, Units
from nemo_spin.evaluate.scorer import checked_score, load_scorer

TEMPERATURES = (1.0, 0.7, 0.5)
SELF_PLAY, FINE_TUNING, START = "self-play", "fine-tuning", "theta_0"
Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way on from theta_0.

    Attributes:
        name: For tables.
        kind: `SELF_PLAY`, `FINE_TUNING` or `START` (theta_0 as it is).
        overrides: What a user would write behind `nemo-spin run` or `nemo-spin sft`.
        as_long_as: Fine-tuning: the self-play arm that has as many optimizer steps.
    """

    name: str
    kind: str = SELF_PLAY
    overrides: tuple[str, ...] = ()
    as_long_as: str | None = None


def run_arms(world: World, regime: Regime, arms: Sequence[Arm], done: Sequence[Row] = ()) -> Iterator[Row]:
    """Rows of one seed and regime: a row for each iteration of self-play, one for any other arm.

    Args:
        world: The seed's.
        regime: How theta_0 is made.
        arms: In order; fine-tuning after the self-play whose steps it takes.
        done: Rows of an earlier start; their arms are not run again.
    """
    steps = {row["arm"]: row["steps"] for row in done}  # the last row of an arm has all of its steps
    todo = [arm for arm in arms if arm.name not in steps]
    if not todo:
        return
    theta_0, demonstrations = world.theta_0(regime), world.demonstrations(regime)
    common = {"seed": world.seed, "regime": regime.name}
    for arm in todo:
        rows = list(_rows(world, arm, theta_0, demonstrations, steps))  # all of an arm or nothing of it
        steps[arm.name] = rows[-1]["steps"] if rows else 0
        yield from ({**common, "arm": arm.name, "kind": arm.kind, **row} for row in rows)


def _rows(
    world: World, arm: Arm, theta_0: Any, demonstrations: pa.Table, steps: dict[str, int]
) -> Iterator[Row]:
    if arm.kind == START:
        yield {"iteration": None, "steps": 0, **measured(world, theta_0)}
    elif arm.kind == FINE_TUNING:
        limit = () if arm.as_long_as is None else (f"sft.max_steps={steps[arm.as_long_as]}",)
        config = world.settings("continued_sft", *arm.overrides, *limit)
        model, taken = fine_tuned(theta_0, demonstrations, config)
        yield {"iteration": None, "steps": taken, **measured(world, model)}
    else:
        config, taken = world.settings("quickstart", *arm.overrides), 0
        played = self_play(theta_0, demonstrations, config, world.template.end_token_id)
        for number, iteration in enumerate(played, start=1):
            taken += iteration.steps
            yield {
                "iteration": number,
                "steps": taken,
                "equal_share": iteration.equal_share,
                "real_change": iteration.real_change,
                **measured(world, iteration.model),
            }


def measured(world: World, model: Any) -> Row:
    """Held-out numbers of a model; `drawn` and `answers` are of one sampled answer to each prompt."""
    found = exact_matches(model, Units(world.heldout, REAL_ONLY), TEMPERATURES)
    answers = sample(
        model,
        world.heldout["prompt_ids"].to_pylist(),
        max_tokens=world.settings("quickstart").generation.max_tokens,
        end_token_id=world.template.end_token_id,
        seed=(world.seed, 1),
    )
    texts = [world.template.response_text(each[0]) for each in answers]
    reals = world.heldout["real_text"].to_pylist()
    scorer = load_scorer("examples.quickstart.exact_match:score")
    right = [
        checked_score(scorer, prompt="", real=real, response=text)
        for real, text in zip(reals, texts, strict=True)
    ]
    kinds = Counter(kind_of(real, text) for real, text in zip(reals, texts, strict=True))
    return {
        "nll": found["nll"],
        "greedy": found["greedy"],
        "sampled": {str(temperature): share for temperature, share in found["sampled"].items()},
        "drawn": sum(right) / len(right),
        "answers": {name: kinds[name] / len(texts) for name in KINDS},
    }


KINDS = ("right", "order", "letters", "form")


def kind_of(real: str, text: str) -> str:
    """`right`; the right letters in a wrong `order`; wrong `letters`; or not six letters (`form`)."""
    wanted, found = real.split(), text.split()
    if found == wanted:
        return "right"
    if sorted(found) == sorted(wanted):
        return "order"
    return "letters" if len(found) == len(wanted) and all(len(part) == 1 for part in found) else "form"
