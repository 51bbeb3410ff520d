"""Forward steps for Megatron's pipeline schedules: what each microbatch computes and reports.

A schedule calls `forward_step(data_iterator, model)` on every pipeline stage and, on the
last one, the loss function that comes back with it. Losses are sums; Megatron divides
their gradient once by the number of weighted units in the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemo_spin.data.datasets import Microbatch
from nemo_spin.megatron.runtime import Runtime
from nemo_spin.megatron.vocab_parallel import sequence_logps, token_logps
from nemo_spin.objective.losses import Loss, PairLogps, margin

# What a training or validation step reports, as sums over units; see `summarise`.
SPIN_SUMS = (
    "loss",
    "units",
    "correct",
    "margin",
    "policy_real_logps",
    "policy_generated_logps",
    "opponent_real_logps",
    "opponent_generated_logps",
    "real_tokens",
    "generated_tokens",
)
SFT_SUMS = ("loss", "units", "policy_real_logps", "real_tokens")

# What a loss function gives on the last stage: the sum that is differentiated, the
# number it will be divided by, and the sums to report.
LossOutput = tuple[Tensor, Tensor, Tensor]
LossFunction = Callable[[Microbatch, Tensor], LossOutput]


def policy_logps(microbatch: Microbatch, logits: Tensor, *, vocab_size: int, tp_group: Any) -> Tensor:
    """Sums of response log-probabilities from the output of the last stage.

    Args:
        logits: [B, S, V/TP].

    Returns:
        [B] float32; equal on all ranks of the tensor-parallel group.
    """
    at_responses = logits.flatten(0, 1).index_select(0, microbatch.target_positions)
    per_token = token_logps(at_responses, microbatch.target_ids, vocab_size=vocab_size, tp_group=tp_group)
    return sequence_logps(per_token, microbatch.target_sequences, microbatch.num_sequences)


def spin_loss(microbatch: Microbatch, logps: Tensor, *, loss: Loss, beta: float) -> LossOutput:
    """Sum of the SPIN loss over the pairs of a microbatch (real and generated alternate)."""
    weights = microbatch.weights[0::2]
    pairs = PairLogps(
        policy_real=logps[0::2],
        policy_generated=logps[1::2],
        opponent_real=microbatch.opponent_logps[0::2].float(),
        opponent_generated=microbatch.opponent_logps[1::2].float(),
    )
    margins = margin(pairs, beta)
    losses = torch.where(weights > 0, loss(margins), 0.0)
    tokens = torch.bincount(microbatch.target_sequences, minlength=microbatch.num_sequences)
    columns = [
        losses,
        torch.ones_like(weights),
        (margins > 0).float(),
        margins,
        *pairs,
        tokens[0::2],
        tokens[1::2],
    ]
    return losses.sum(), _count(weights), _weighted_sums(columns, weights)


def sft_loss(microbatch: Microbatch, logps: Tensor) -> LossOutput:
    """Sum of the negative log-likelihood of real responses; divided by their tokens."""
    weights = microbatch.weights
    losses = torch.where(weights > 0, -logps, 0.0)
    tokens = torch.bincount(microbatch.target_sequences, minlength=microbatch.num_sequences)
    num_tokens = (tokens * weights).sum()
    columns = [losses, torch.ones_like(weights), logps, tokens]
    return losses.sum(), num_tokens.round().to(torch.int), _weighted_sums(columns, weights)


def _count(weights: Tensor) -> Tensor:
    return weights.sum().round().to(torch.int)


def _weighted_sums(columns: list[Tensor], weights: Tensor) -> Tensor:
    """[len(columns)] float64; ghosts count for nothing, whatever their values."""
    stacked = torch.stack([column.detach().double() for column in columns])
    return torch.where(weights > 0, stacked, 0.0).sum(dim=-1)


@dataclass(frozen=True)
class ForwardStep:
    """Callable that Megatron's schedules take as `forward_step_func`.

    Attributes:
        loss_function: Applied to the log-probabilities on the last stage; None reports
            them as they are (scoring).
        vocab_size: Size of the vocabulary without padding.
        runtime: This rank's place.
    """

    loss_function: LossFunction | None
    vocab_size: int
    runtime: Runtime

    def __call__(self, data_iterator: Iterator[Microbatch], model: Any) -> tuple[Tensor, Any]:
        """Runs one microbatch through this stage.

        Returns:
            The stage's output (hidden states, or [B, S, V/TP] logits on the last stage)
            and the function that makes the loss of it.
        """
        microbatch = next(data_iterator)
        output = model(microbatch.input_ids, microbatch.position_ids, attention_mask=None)
        return output, partial(self._finish, microbatch)

    def _finish(self, microbatch: Microbatch, logits: Tensor, non_loss_data: bool = False) -> Any:
        logps = policy_logps(
            microbatch, logits, vocab_size=self.vocab_size, tp_group=self.runtime.tp_group
        )
        if self.loss_function is None or non_loss_data:
            return microbatch.rows, logps.detach()
        return self.loss_function(microbatch, logps)


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
    for kind in ("real", "generated"):
        if f"{kind}_tokens" in sums:
            tokens = max(sums[f"{kind}_tokens"], 1.0)
            means[f"policy_{kind}_logps_per_token"] = sums[f"policy_{kind}_logps"] / tokens
    return means
