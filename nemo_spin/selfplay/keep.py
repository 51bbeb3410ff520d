"""Which model of a run is kept: `RUN_DIR/kept` links to it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nemo_spin.selfplay.guards import heldout_real_logps
from nemo_spin.selfplay.results import iteration_results, number, read_evaluation
from nemo_spin.selfplay.run_directory import RunDirectory

SCORE, LIKELIHOOD = "held-out score (sampled)", "held-out real log-probability per token"


@dataclass(frozen=True)
class Candidate:
    """A model that could be kept.

    Attributes:
        name: theta_0, theta_1, …
        directory: Hugging Face directory.
        score: Mean score of its sampled answers; None without a scorer.
        likelihood: Mean log-probability of held-out demonstrations, nats per token.
    """

    name: str
    directory: Path
    score: float | None
    likelihood: float | None


def candidates(run: RunDirectory, theta_0: Path) -> list[Candidate]:
    """theta_0, and every model that an iteration has exported."""
    first = read_evaluation(run.iteration(0).opponent_evaluation_path)
    before = heldout_real_logps(iteration_results(run, 0).training, "opponent")
    found = [Candidate("theta_0", theta_0, number(first, "sampled", "score"), before)]
    for iteration in run.existing_iterations():
        results, files = iteration_results(run, iteration), run.iteration(iteration)
        if (files.model / "config.json").exists():
            score = number(results.evaluation, "sampled", "score")
            likelihood = heldout_real_logps(results.training, "policy")
            found.append(Candidate(f"theta_{iteration + 1}", files.model, score, likelihood))
    return found


def choose(models: list[Candidate], keep: str) -> tuple[Candidate, str]:
    """The model to keep and by what; of equals the earliest.

    Args:
        models: At least one, in order; only what was measured of all of them is compared.
        keep: `best` or `last`.
    """
    if keep == "best":
        for what, values in (
            (SCORE, [model.score for model in models]),
            (LIKELIHOOD, [model.likelihood for model in models]),
        ):
            known = [value for value in values if value is not None]
            if len(known) == len(models):
                return models[known.index(max(known))], what
    return models[-1], "the last"


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
