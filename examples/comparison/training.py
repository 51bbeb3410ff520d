"""Plain fine-tuning and iterations of self-play, in one process.

Batches, schedule, losses, history and what becomes of a pair of twice the same response are the
project's own; the settings are a configuration as `nemo-spin` takes it. PyTorch's AdamW stands
for Megatron's wrapper around it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from examples.comparison.player import lay_out, logps, sample, score
from nemo_spin.config.iterations import at_iteration, mixed_iterations
from nemo_spin.config.schema import Config
from nemo_spin.data.columns import TOKEN_IDS
from nemo_spin.data.datasets import REAL_ONLY, Batches, Units
from nemo_spin.data.pairs import without_identical
from nemo_spin.errors import DataError
from nemo_spin.megatron.learning_rate import learning_rate
from nemo_spin.objective.losses import PairLogps
from nemo_spin.objective.objective import Objective, build_objective
from nemo_spin.objective.options import PairLengths

Loss = Callable[[Any, Units, list[int]], Tensor]


@dataclass
class Iteration:
    """What an iteration of self-play left behind.

    Attributes:
        model: theta_t+1.
        steps: Optimizer steps of it.
        equal_share: Of the answers, those that are the demonstration already.
        real_change: Of the real responses' log-probability, mean over the training prompts, in nats.
    """

    model: Any
    steps: int
    equal_share: float
    real_change: float


def sft_loss(model: Any, units: Units, indices: list[int]) -> Tensor:
    """Negative log-likelihood per token of the real responses."""
    rows = lay_out(units, indices)
    return -logps(model, rows).sum() / len(rows.targets)


def spin_loss(model: Any, units: Units, indices: list[int], *, objective: Objective) -> Tensor:
    """Mean over the units of the mean loss of their pairs."""
    rows = lay_out(units, indices)
    policy = logps(model, rows)
    known = [value for index in indices for value in units.opponent_logps(index)]
    opponent = torch.tensor(known, dtype=policy.dtype)
    tokens = torch.bincount(rows.responses, minlength=rows.num_responses)
    real, generated, weights, end = [], [], [], 0
    for index in indices:
        k = len(units.responses(index)) - 1
        real += [end] * k
        generated += range(end + 1, end + 1 + k)
        weights += [1.0 / (k * len(indices))] * k
        end += 1 + k
    pairs = PairLogps(policy[real], policy[generated], opponent[real], opponent[generated])
    losses = objective(pairs, PairLengths(tokens[real], tokens[generated]))
    return (losses * torch.tensor(weights, dtype=losses.dtype)).sum()


def fine_tuned(model: Any, prepared: pa.Table, config: Config) -> tuple[Any, int]:
    """A copy of `model` after plain fine-tuning (`sft.*`), and the optimizer steps it took."""
    units = Units(prepared, REAL_ONLY)
    batches = _batches(units, config, epochs=config.sft.epochs, iteration=0)
    steps = (
        batches.num_steps if config.sft.max_steps is None else min(batches.num_steps, config.sft.max_steps)
    )
    policy = copy.deepcopy(model)
    _optimise(policy, units, batches, sft_loss, config=config, lr=config.sft.lr, steps=steps, planned=steps)
    return policy, steps


def self_play(model: Any, prepared: pa.Table, config: Config, end_token_id: int) -> Iterator[Iteration]:
    """Iterations from `model` as theta_0, until `spin.iterations` or nothing is left to learn from."""
    answers: list[pa.Table] = []
    for iteration in range(config.spin.iterations):
        answers.append(generated(model, prepared, config, iteration, end_token_id))
        mixed = pa.concat_tables(answers[number] for number in mixed_iterations(config.spin, iteration))
        objective = _objective(config, iteration)
        try:
            rows = mixed if objective.identical_count else without_identical(mixed)
        except DataError:  # every answer is the demonstration
            return
        opponent, rows = model, scored(model, rows)
        units = Units(rows)
        batches = _batches(
            units, config, epochs=at_iteration(config.spin.epochs, iteration), iteration=iteration
        )

        def loss(policy: Any, units: Units, indices: list[int], objective: Objective = objective) -> Tensor:
            return spin_loss(policy, units, indices, objective=objective)

        model = copy.deepcopy(opponent)
        steps = min(batches.num_steps, at_iteration(config.spin.max_steps, iteration) or batches.num_steps)
        lr = float(at_iteration(config.spin.lr, iteration))
        _optimise(model, units, batches, loss, config=config, lr=lr, steps=steps, planned=batches.num_steps)
        real = Units(prepared, REAL_ONLY)
        change = torch.cat(score(model, real)) - torch.cat(score(opponent, real))
        yield Iteration(model, steps, equal_share(answers[-1]), float(change.mean()))


def generated(model: Any, prepared: pa.Table, config: Config, iteration: int, end_token_id: int) -> pa.Table:
    """`generation.num_generations` rows for each demonstration: it and an answer of `model`."""
    settings = config.generation
    answers = sample(
        model,
        prepared["prompt_ids"].to_pylist(),
        num_generations=settings.num_generations,
        temperature=float(at_iteration(settings.temperature, iteration)),
        max_tokens=settings.max_tokens,
        end_token_id=end_token_id,
        seed=(config.seed, iteration),
    )
    k = settings.num_generations
    rows = prepared.take([row for row in range(prepared.num_rows) for _ in range(k)])
    flat = [ids for each in answers for ids in each]
    rows = rows.append_column("generated_ids", pa.array(flat, TOKEN_IDS))
    return rows.append_column("iteration", pa.array([iteration] * len(flat), pa.int32()))


def equal_share(rows: pa.Table) -> float:
    """Of the generated responses, those that are the real one."""
    pairs = zip(rows["real_ids"].to_pylist(), rows["generated_ids"].to_pylist(), strict=True)
    return sum(real == answer for real, answer in pairs) / rows.num_rows


def scored(model: Any, rows: pa.Table) -> pa.Table:
    """`rows` with the opponent's log-probabilities, which are `model`'s."""
    columns: dict[str, list[float]] = {"opponent_real_logps": [], "opponent_generated_logps": []}
    for sums in score(model, Units(rows)):
        real, *others = sums.tolist()
        columns["opponent_real_logps"] += [real] * len(others)
        columns["opponent_generated_logps"] += others
    for name, values in columns.items():
        rows = rows.append_column(name, pa.array(values, pa.float64()))
    return rows


def _objective(config: Config, iteration: int) -> Objective:
    spin = config.spin
    assert not spin.opponent_mix, "nothing here scores rows with theta_0"
    return build_objective(
        loss=spin.loss,
        beta=float(at_iteration(spin.beta, iteration)),
        length_normalized=spin.length_normalized,
        label_smoothing=spin.label_smoothing,
        sft_weight=spin.sft_weight,
        dpop_weight=spin.dpop_weight,
    )


def _batches(units: Units, config: Config, *, epochs: int, iteration: int) -> Batches:
    size = config.model.global_batch_size
    return Batches(units.num_units, size, epochs=epochs, seed=config.seed, iteration=iteration)


def _optimise(
    policy: Any,
    units: Units,
    batches: Batches,
    loss: Loss,
    *,
    config: Config,
    lr: float,
    steps: int,
    planned: int,
) -> None:
    """Trains `policy` in place."""
    optim = config.model.optim
    assert optim.name == "adam", "the quickstart's optimizer"
    optimizer = torch.optim.AdamW(
        policy.parameters(), betas=tuple(optim.betas), eps=optim.eps, weight_decay=optim.weight_decay
    )
    for step in range(steps):
        rate = learning_rate(step, num_steps=planned, peak=lr, sched=optim.sched)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss(policy, units, batches.indices(step).tolist()).backward()
        if optim.clip_grad:
            torch.nn.utils.clip_grad_norm_(policy.parameters(), optim.clip_grad)
        optimizer.step()
