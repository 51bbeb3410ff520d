"""Forward steps for Megatron's pipeline schedules: what each microbatch computes and reports.

A schedule calls `forward_step(data_iterator, model)` on every pipeline stage and, on the
last one, the loss function that comes back with it. Losses are sums; Megatron divides
their gradient once by their number in the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

from nemo_spin.data.packing import Microbatch
from nemo_spin.megatron.runtime import Runtime
from nemo_spin.megatron.vocab_parallel import output_weight, response_logps
from nemo_spin.objective.log_probs import response_sums
from nemo_spin.objective.losses import PairLogps
from nemo_spin.objective.objective import Objective
from nemo_spin.objective.options import BaseLogps, PairLengths

# What a training or validation step reports, as sums over units; see `summarise`.
SPIN_SUMS = (
    "loss",
    "start_loss",
    "units",
    "correct",
    "margin",
    "policy_real_logps",
    "policy_generated_logps",
    "opponent_real_logps",
    "opponent_generated_logps",
    "real_rewards",
    "generated_rewards",
    "real_tokens",
    "generated_tokens",
)
SFT_SUMS = ("loss", "units", "policy_real_logps", "real_tokens")

# What a loss function gives on the last stage: the sum that is differentiated, the
# number it will be divided by, and the sums to report.
LossOutput = tuple[Tensor, Tensor, Tensor]
LossFunction = Callable[[Microbatch, Tensor], LossOutput]


def spin_loss(microbatch: Microbatch, logps: Tensor, *, objective: Objective) -> LossOutput:
    """Sum over the units of a microbatch of the mean SPIN loss of their pairs.

    Args:
        microbatch: The units.
        logps: [Q] float32, the policy's sums for all responses.
        objective: The loss of each pair.
    """
    real, generated = microbatch.pair_real, microbatch.pair_generated
    opponent, base = microbatch.opponent_logps.float(), microbatch.base_logps.float()
    pairs = PairLogps(logps[real], logps[generated], opponent[real], opponent[generated])
    tokens = microbatch.response_tokens
    lengths = PairLengths(tokens[real], tokens[generated])
    arguments = (pairs, lengths, BaseLogps(base[real], base[generated]))
    margins = objective.margins(*arguments)
    weights = _pair_weights(microbatch)
    losses = objective(*arguments)
    columns = [
        losses,
        objective.at_start(*arguments),
        torch.ones_like(weights),
        (margins > 0).float(),
        margins,
        *pairs,
        *objective.rewards(*arguments),
        *lengths,
    ]
    # `where` and not only a product: the loss of a ghost may overflow
    total = torch.where(weights > 0, losses * weights.float(), 0.0).sum()
    return total, _count(microbatch.unit_weights.sum()), _weighted_sums(columns, weights)


def _pair_weights(microbatch: Microbatch) -> Tensor:
    """[P] float64: 1/k for each of the k pairs of a unit, 0 for those of a ghost."""
    pairs_per_unit = torch.bincount(microbatch.pair_units, minlength=len(microbatch.unit_weights))
    return (microbatch.unit_weights.double() / pairs_per_unit.clamp(min=1))[microbatch.pair_units]


def sft_loss(microbatch: Microbatch, logps: Tensor) -> LossOutput:
    """Sum of the negative log-likelihood of real responses; divided by their tokens."""
    weights = microbatch.unit_weights
    real = logps[microbatch.unit_real]
    tokens = microbatch.response_tokens[microbatch.unit_real]
    losses = torch.where(weights > 0, -real, 0.0)
    columns = [losses, torch.ones_like(weights), real, tokens]
    return losses.sum(), _count((tokens * weights).sum()), _weighted_sums(columns, weights)


def _count(value: Tensor) -> Tensor:
    return value.round().to(torch.int)


def _weighted_sums(columns: list[Tensor], weights: Tensor) -> Tensor:
    """[len(columns)] float64; ghosts count for nothing, whatever their values."""
    stacked = torch.stack([column.detach().double() for column in columns])
    return torch.where(weights > 0, stacked * weights, 0.0).sum(dim=-1)


@dataclass(frozen=True)
class ForwardStep:
    """Callable that Megatron's schedules take as `forward_step_func`.

    Attributes:
        loss_function: Applied to the policy's log-probabilities on the last stage; None
            reports them as they are (scoring).
        vocab_size: Size of the vocabulary without padding.
        runtime: This rank's place.
    """

    loss_function: LossFunction | None
    vocab_size: int
    runtime: Runtime

    def __call__(self, data_iterator: Iterator[Microbatch], model: Any) -> tuple[Tensor, Any]:
        """Runs one microbatch through this stage.

        Returns:
            The stage's hidden states and the function that makes the loss of them.
        """
        microbatch = next(data_iterator)
        output = model(microbatch.input_ids, microbatch.position_ids, attention_mask=microbatch.segments)
        return output, partial(self._finish, microbatch, getattr(model, "module", model))

    def _finish(
        self, microbatch: Microbatch, gpt: Any, hidden_states: Tensor, non_loss_data: bool = False
    ) -> Any:
        per_token = response_logps(
            hidden_states,
            output_weight(gpt),
            positions=microbatch.target_positions,
            targets=microbatch.target_ids,
            vocab_size=self.vocab_size,
            sequence_parallel=gpt.config.sequence_parallel,
            tp_group=self.runtime.tp_group,
            logit_cap=gpt.logit_cap,
        )
        logps = response_sums(per_token, microbatch.target_responses, microbatch.num_responses)
        if self.runtime.cp_size > 1:
            # Sums over the ranks' shares of each response. Backward is the identity: every rank
            # forms the same loss, and gradients of its own tokens are all that it adds to the sum.
            logps = reduce_from_tensor_model_parallel_region(logps, group=self.runtime.cp_group)
        if self.loss_function is None or non_loss_data:
            return microbatch, logps.detach()
        total, count, sums = self.loss_function(microbatch, logps)
        # Megatron adds the counts of all ranks of a data- and context-parallel group
        return total, count if self.runtime.cp_rank == 0 else torch.zeros_like(count), sums


def row_logps(microbatch: Microbatch, logps: Tensor) -> dict[int, tuple[float, float]]:
    """(real, generated) sums of each table row of a microbatch of pairs."""
    values = logps.double().tolist()
    real, generated, units = (
        column.tolist() for column in (microbatch.pair_real, microbatch.pair_generated, microbatch.pair_units)
    )
    rows = [list(unit_rows) for unit_rows in microbatch.unit_rows]
    result: dict[int, tuple[float, float]] = {}
    for first, second, unit in zip(real, generated, units, strict=True):
        if rows[unit]:  # ghosts have none
            result[rows[unit].pop(0)] = (values[first], values[second])
    return result


def summarise(sums: dict[str, float]) -> dict[str, float]:
    """Means of what a step summed.

    Losses, margins, log-probabilities and tokens per unit, `accuracy` (share of positive
    margins) and log-probabilities per token; the cross-entropy of plain fine-tuning is per
    token, as it is divided in the gradient.
    """
    units = max(sums["units"], 1.0)
    means = {k: v / units for k, v in sums.items() if k not in ("units", "correct")}
    means["units"] = sums["units"]
    if "correct" in sums:
        means["accuracy"] = sums["correct"] / units
    else:
        means["loss"] = sums["loss"] / max(sums["real_tokens"], 1.0)
    for player, kind in product(("policy", "opponent"), ("real", "generated")):
        logps = sums.get(f"{player}_{kind}_logps")
        if logps is not None:
            means[f"{player}_{kind}_logps_per_token"] = logps / max(sums[f"{kind}_tokens"], 1.0)
    return means
