"""Which model of a run is kept: `RUN_DIR/kept` links to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_spin.selfplay.guards import heldout_real_logps
from nemo_spin.selfplay.results import iteration_results, number, read_evaluation
from nemo_spin.selfplay.run_directory import RunDirectory

SCORE, GREEDY = "held-out score (sampled)", "held-out score (greedy)"
LIKELIHOOD = "held-out real log-probability per token"


@dataclass(frozen=True)
class Candidate:
    """A model that could be kept.

    Attributes:
        name: theta_0, theta_1, …
        directory: Hugging Face directory.
        score: Mean score of its sampled answers; None where they were not scored.
        greedy: The same of its greedy answers.
        likelihood: Mean log-probability of held-out demonstrations, nats per token.
    """

    name: str
    directory: Path
    score: float | None
    greedy: float | None
    likelihood: float | None


def candidates(run: RunDirectory, theta_0: Path) -> list[Candidate]:
    """theta_0, and every model that an iteration has exported."""
    first = read_evaluation(run.iteration(0).opponent_evaluation_path)
    before = heldout_real_logps(iteration_results(run, 0).training, "opponent")
    found = [Candidate("theta_0", theta_0, *_scores(first), before)]
    for iteration in run.existing_iterations():
        results, files = iteration_results(run, iteration), run.iteration(iteration)
        if (files.model / "config.json").exists():
            likelihood = heldout_real_logps(results.training, "policy")
            scores = _scores(results.evaluation)
            found.append(Candidate(f"theta_{iteration + 1}", files.model, *scores, likelihood))
    return found


def _scores(evaluation: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return number(evaluation, "sampled", "score"), number(evaluation, "greedy", "score")


def choose(models: list[Candidate], keep: str) -> tuple[Candidate, str]:
    """The model to keep and by what; of equals the earliest.

    Args:
        models: At least one, in order; only what was measured of all of them is compared.
        keep: `best` or `last`.
    """
    if keep == "best":
        for what, values in (
            (SCORE, [model.score for model in models]),
            (GREEDY, [model.greedy for model in models]),
            (LIKELIHOOD, [model.likelihood for model in models]),
        ):
            known = [value for value in values if value is not None]
            if len(known) == len(models):
                return models[known.index(max(known))], what
    return models[-1], "the last"


def describe_scores(chosen: Candidate, models: list[Candidate]) -> str | None:
    """Both scores of the model that is kept, and whose are better, in a line; None without any.

    Self-play may make sampled answers better and greedy ones worse.
    """
    parts = []
    for way, scores in (
        ("sampled", {model.name: model.score for model in models}),
        ("greedy", {model.name: model.greedy for model in models}),
    ):
        known = {name: score for name, score in scores.items() if score is not None}
        if chosen.name not in known:
            continue
        best = max(known, key=lambda name: known[name])
        better = f" (best: {best}, {known[best]:.3f})" if known[best] > known[chosen.name] else ""
        parts.append(f"{way} {known[chosen.name]:.3f}{better}")
    return ", ".join(parts) or None


def keep_model(run: RunDirectory, theta_0: Path, keep: str) -> tuple[Candidate, str]:
    """Makes `kept` point at the chosen model; returns it, and by what it was chosen."""
    chosen, what = choose(candidates(run, theta_0), keep)
    inside = chosen.directory.is_relative_to(run.path)
    target = chosen.directory.relative_to(run.path) if inside else chosen.directory
    if not (run.kept.is_symlink() and Path(os.readlink(run.kept)) == target):
        partial = run.kept.with_name(f".{run.kept.name}.{os.getpid()}.partial")
        partial.unlink(missing_ok=True)
        partial.symlink_to(target)
        os.replace(partial, run.kept)
    return chosen, what
