"""What is compared: the arms of the table, and those of the search that found their settings."""

from __future__ import annotations

from collections.abc import Sequence

from examples.comparison.arms import FINE_TUNING, START, Arm
from examples.comparison.world import QUICKSTART_SEED, Regime

SEEDS = (1235, 1236, 1237)
SEARCH_SEED = QUICKSTART_SEED  # none of those that are reported

QUICKSTART = Regime()
WRONG = Regime("a quarter wrong", mistakes=0.25)
# theta_0 has seen each of them 16 times: fine-tuning on them again is to repeat what it knows
FEW = Regime("128 demonstrations", demonstrations=128, sft=("sft.epochs=16",))


def fine_tuning(as_long_as: str, lr: str = "1e-4") -> Arm:
    """Fine-tuning continued for as many optimizer steps as a self-play arm takes."""
    name = f"fine-tuning for as many steps as {as_long_as}" + ("" if lr == "1e-4" else f", lr {lr}")
    return Arm(name, FINE_TUNING, (f"sft.lr={lr}",), as_long_as=as_long_as)


def answers(number: int, iterations: int = 3) -> Arm:
    """Self-play with several answers to each prompt."""
    plural = "iteration" if iterations == 1 else "iterations"
    return Arm(
        f"{iterations} {plural}, {number} answers per prompt",
        overrides=(f"generation.num_generations={number}", f"spin.iterations={iterations}"),
    )


# The paper's figures 4 and 5 and its table 3, in small. `self-play` is the quickstart as it is.
TABLE: Sequence[tuple[Regime, Sequence[Arm]]] = (
    (
        QUICKSTART,
        (
            Arm("theta_0", START),
            Arm("self-play"),
            Arm("self-play without history", overrides=("spin.history=0",)),
            Arm("one iteration of 4 epochs", overrides=("spin.iterations=1", "spin.epochs=4")),
            Arm("one iteration of 9 epochs", overrides=("spin.iterations=1", "spin.epochs=9")),
            answers(4),
            answers(16, iterations=1),
            fine_tuning("1 iteration, 16 answers per prompt"),
            fine_tuning("self-play"),
            fine_tuning("3 iterations, 4 answers per prompt"),
        ),
    ),
    (
        WRONG,
        (
            Arm("theta_0", START),
            Arm("self-play"),
            answers(4),
            fine_tuning("3 iterations, 4 answers per prompt"),
            fine_tuning("3 iterations, 4 answers per prompt", "3e-4"),
            fine_tuning("3 iterations, 4 answers per prompt", "1e-3"),
        ),
    ),
)

# Self-play by what differs from the quickstart; two iterations each where that is not it.
_FOUR, _SIXTEEN = "generation.num_generations=4", "generation.num_generations=16"
_ONE = ("spin.beta=1.0", "spin.beta=0.1", "spin.beta=0.3 spin.lr=3e-4", "spin.beta=10.0")
_LOSSES = tuple(f"spin.loss={loss}" for loss in ("hinge", "exponential", "correlation", "ipo"))
_OPTIONS = ("spin.length_normalized=true spin.beta=10.0", "spin.sft_weight=1.0")
_SIX = "spin.iterations=6 spin.epochs=4"


def _tried(*differences: str) -> list[Arm]:
    arms = [Arm(each, overrides=("spin.iterations=2", *each.split())) for each in differences]
    return [Arm("theta_0", START), *arms]


SEARCH: Sequence[tuple[Regime, Sequence[Arm]]] = (
    (QUICKSTART, _tried(*_ONE, *_LOSSES, *_OPTIONS)),
    (
        WRONG,
        (
            *_tried(*_ONE, "spin.beta=0.3", _FOUR, f"{_FOUR} spin.beta=0.3"),
            *(fine_tuning(_FOUR, lr) for lr in ("1e-4", "3e-4", "1e-3")),
        ),
    ),
    (
        FEW,
        (
            *_tried(f"{_FOUR} {_SIX}", f"{_SIXTEEN} {_SIX}"),
            *(fine_tuning(f"{_FOUR} {_SIX}", lr) for lr in ("1e-4", "3e-5")),
            fine_tuning(f"{_SIXTEEN} {_SIX}"),
        ),
    ),
)
