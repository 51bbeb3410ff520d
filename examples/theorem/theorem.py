"""SPIN's theorem, run: self-play against known distributions, every expectation an exact sum.

    python examples/theorem/theorem.py [--seeds 5] [--plot theorem.svg]

Prints what it finds, checks what it claims, and ends with an error if a claim does not hold.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from distribution import disturbed, kl, markov_table, response_logps, total_variation
from plot import Line, write_plot
from selfplay import (
    closed_form,
    early_stopped,
    full_sum,
    generation_noise,
    optimised_table,
    optimum,
    play,
    sft_gradient,
    starting_gradient,
)
from torch import Tensor

from nemo_spin.objective.losses import LOSSES

LOGISTIC = LOSSES["logistic"]


class Claims:
    """What is checked, and what did not hold."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def check(self, text: str, holds: bool) -> None:
        """Prints the claim with its outcome."""
        print(f"  {'ok    ' if holds else 'FAILED'} {text}")
        if not holds:
            self.failed.append(text)


class World:
    """p_data and theta_0 of one seed, as tables and as log-probabilities of all responses."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.data_table = markov_table(generator)
        self.table = disturbed(self.data_table, generator)
        self.data, self.start = response_logps(self.data_table), response_logps(self.table)

    def to_the_end(self, loss: str, beta: float, iterations: int) -> list[Tensor]:
        """theta_0, theta_1, … when each iteration is optimised to its end."""
        step = partial(optimum, data=self.data, loss=LOSSES[loss], beta=beta)
        return list(play(self.start, step, iterations))

    def stopped_early(self, loss: str, beta: float, iterations: int) -> list[Tensor]:
        """theta_0, theta_1, … when each iteration is 20 RMSProp steps."""
        step = partial(early_stopped, data=self.data, loss=LOSSES[loss], beta=beta)
        return [response_logps(table) for table in play(self.table, step, iterations)]

    def kls(self, policies: list[Tensor]) -> list[float]:
        """KL(p_data || p) of each."""
        return [kl(self.data, policy) for policy in policies]


def falls(values: list[float]) -> bool:
    """Whether each value is below the one before."""
    return all(later < earlier for earlier, later in pairwise(values))


def row(name: str, values: list[float]) -> None:
    """Prints one line of a table."""
    print(
        f"  {name:<34}" + "".join(f"{value:>9.2g}" if value < 1e-3 else f"{value:>9.4g}" for value in values)
    )


def convergence(worlds: list[World], claims: Claims) -> None:
    """Logistic loss, beta 2, each iteration optimised to the end."""
    print("\nLogistic loss, beta 2, each iteration to the end: KL(p_data || p_t), total variation")
    furthest = 0.0
    for seed, world in enumerate(worlds):
        policies = world.to_the_end("logistic", 2.0, 5)
        kls = world.kls(policies)
        row(f"seed {seed}, KL", kls)
        row(f"seed {seed}, TV", [total_variation(world.data, policy) for policy in policies])
        fold = kls[0] / kls[-1]
        claims.check(
            f"KL falls at each of five iterations, {fold:.0f}-fold in all (>= 100)",
            falls(kls) and fold >= 100,
        )
        for before, after in pairwise(policies):
            expected = closed_form(before, world.data, 1 / 2.0)
            furthest = max(furthest, float((after - expected).abs().max()))
    claims.check(
        "every iterate is p_t (p_data / p_t)^(1/beta), normalised: "
        f"log-probabilities differ by at most {furthest:.0e} (< 1e-3)",
        furthest < 1e-3,
    )
    world = worlds[0]
    by_table = optimised_table(world.table, world.data, loss=LOGISTIC, beta=2.0)
    difference = total_variation(by_table, closed_form(world.start, world.data, 1 / 2.0))
    claims.check(
        f"L-BFGS on the autoregressive table ends there too: total variation {difference:.0e} (< 1e-3)",
        difference < 1e-3,
    )


def stability(world: World, claims: Claims) -> list[Line]:
    """Which beta lets fully optimised self-play converge, and what early stopping changes."""
    print("\nSeed 0, KL by iteration, by beta")
    lines = []
    for loss, stable_above in (("logistic", 1 / 2), ("exponential", 1 / 4)):
        power = {"logistic": "1/beta", "exponential": "1/(2 beta)"}[loss]
        for beta in (2.0, 1.0, 0.6, 0.4, 0.1) if loss == "logistic" else (1.0, 0.3, 0.2):
            iterations = 2 if beta == 0.1 else 6  # log-probabilities of -1e4 follow: beyond float64
            policies = world.to_the_end(loss, beta, iterations)
            kls = world.kls(policies)
            row(f"{loss}, beta {beta:g}, to the end", kls)
            if loss == "logistic":
                lines.append(Line(f"beta {beta:g}, to the end", kls))
            if beta > stable_above:
                claims.check(f"converges: beta is above {stable_above:g}", kls[-1] < 0.01 * kls[0])
            else:
                claims.check(f"diverges: beta is below {stable_above:g}", falls(kls[::-1]))
            multiple = 1 / beta if loss == "logistic" else 1 / (2 * beta)
            expected = closed_form(policies[0], world.data, multiple)
            found = total_variation(policies[1], expected)
            claims.check(f"the first iterate has power {power}: total variation {found:.0e}", found < 1e-6)
    kls = world.kls(world.stopped_early("logistic", 0.1, 6))
    row("logistic, beta 0.1, 20 steps", kls)
    claims.check("converges: beta 0.1, stopped after 20 RMSProp steps", falls(kls) and kls[-1] < 0.1 * kls[0])
    return [*lines, Line("beta 0.1, 20 steps", kls, dashed=True)]


def all_losses(world: World, claims: Claims) -> None:
    """The four losses, stopped early; and why two of them are not optimised to the end."""
    print("\nSeed 0, beta 0.1, 20 RMSProp steps per iteration: KL, total variation")
    for loss in LOSSES:
        policies = world.stopped_early(loss, 0.1, 6)
        kls = world.kls(policies)
        row(f"{loss}, KL", kls)
        row(f"{loss}, TV", [total_variation(world.data, policy) for policy in policies])
        claims.check(
            "KL falls at each of six iterations, at least 10-fold", falls(kls) and kls[-1] < 0.1 * kls[0]
        )

    def value(power: float, loss: str) -> float:
        policy = closed_form(world.start, world.data, power)
        return float(full_sum(policy, world.start, world.data, loss=LOSSES[loss], beta=1.0))

    once, tenfold, hundredfold = (value(power, "correlation") for power in (1.0, 10.0, 100.0))
    claims.check(
        "correlation has no optimum to go to, it falls without end: "
        f"{once:.3g}, {tenfold:.3g}, {hundredfold:.3g} at p_t (p_data / p_t)^1, ^10, ^100",
        once < 1.0 and abs((1.0 - hundredfold) - 100.0 * (1.0 - once)) < 1e-9,
    )


def fixed_point(worlds: list[World], claims: Claims) -> None:
    """Where the objective of an iteration has no gradient when the iteration begins."""
    print("\nGradient norm of the full sum at the start of an iteration, beta 0.1: at p_data, at theta_0")
    for name, loss in LOSSES.items():
        at_data, at_start, against_sft = 0.0, float("inf"), 0.0
        for world in worlds:
            there = starting_gradient(world.data_table, world.data, world.data, loss=loss, beta=0.1)
            here = starting_gradient(world.table, world.start, world.data, loss=loss, beta=0.1)
            share = 0.05 if name == "logistic" else 0.1  # -l'(0) beta
            at_data, at_start = max(at_data, float(there.norm())), min(at_start, float(here.norm()))
            against_sft = max(
                against_sft, float((here - share * sft_gradient(world.table, world.data)).norm())
            )
        row(name, [at_data, at_start])
        claims.check("zero at p_theta = p_data and not at theta_0", at_data < 1e-15 and at_start > 1e-3)
        claims.check(
            f"-l'(0) beta times plain fine-tuning's gradient, to {against_sft:.0e}", against_sft < 1e-15
        )
    world, generator = worlds[0], torch.Generator().manual_seed(99)
    others = [markov_table(generator) for _ in range(100)]
    norms = [
        float(starting_gradient(t, response_logps(t), world.data, loss=LOGISTIC, beta=0.1).norm())
        for t in others
    ]
    claims.check(f"not zero at any of 100 other policies: at least {min(norms):.2g}", min(norms) > 1e-3)
    print("  Against the opponent p_data, gradient norm at theta_0 instead:")
    for name, loss in LOSSES.items():
        norm = float(starting_gradient(world.table, world.data, world.data, loss=loss, beta=0.1).norm())
        row(name, [norm])
        if name in ("logistic", "exponential"):
            claims.check("strictly convex: it leads back to p_data from everywhere", norm > 1e-4)
        else:
            claims.check("flat around margin 0: p_data is kept, but does not attract", norm < 1e-15)


def noise(worlds: list[World], claims: Claims) -> None:
    """What several generations per prompt do to a sampled gradient."""
    print("\nSampled gradients at theta_0, 256 real responses, mean over seeds: noise over signal, cosine")
    by_number: dict[int, float] = {}
    for number in (1, 4, 16):
        found = [
            generation_noise(
                world.table,
                world.data,
                number,
                loss=LOGISTIC,
                beta=0.1,
                generator=torch.Generator().manual_seed(seed),
            )
            for seed, world in enumerate(worlds)
        ]
        by_number[number] = sum(ratio for ratio, _ in found) / len(found)
        row(f"{number} generations per prompt", [by_number[number], sum(c for _, c in found) / len(found)])
    ratios = [by_number[1] / by_number[4], by_number[4] / by_number[16]]
    claims.check(
        f"four times the generations, half the noise: {ratios[0]:.2f}, {ratios[1]:.2f} (2 within 10%)",
        all(1.8 < ratio < 2.2 for ratio in ratios),
    )


def main() -> int:
    """Runs everything; 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description="SPIN's theorem on distributions that are known.")
    parser.add_argument("--seeds", type=int, default=5, help="how many distributions")
    parser.add_argument("--plot", type=Path, help="write the plot to this SVG file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began, claims = time.monotonic(), Claims()
    worlds = [World(seed) for seed in range(arguments.seeds)]
    convergence(worlds, claims)
    lines = stability(worlds[0], claims)
    all_losses(worlds[0], claims)
    fixed_point(worlds, claims)
    noise(worlds, claims)
    if arguments.plot is not None:
        write_plot(
            arguments.plot,
            lines,
            title="Self-play on a known distribution: KL(p_data || p_t), logistic loss",
            x_label="iteration",
            low=1e-5,
        )
        print(f"\nWrote {arguments.plot}")
    print(f"\n{time.monotonic() - began:.0f} s; {len(claims.failed) or 'no'} claims failed")
    return 1 if claims.failed else 0


if __name__ == "__main__":
    sys.exit(main())
