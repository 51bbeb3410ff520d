"""Log-probabilities of tokens when every tensor-parallel rank holds a slice of the vocabulary.

Legend: N tokens, V vocabulary (padded), TP tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


class _VocabParallelLogps(torch.autograd.Function):
    """log softmax(logits)[target], with three all-reduces of [N] forward and none backward.

    With p = softmax(logits) the gradient of log p[target] is onehot(target) - p, which
    every rank can form for its own slice from the global maximum and normaliser.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, targets: Tensor, vocab_size: int, tp_group: Any
    ) -> Tensor:
        rows = logits.shape[-1]
        first = distributed.get_rank(tp_group) * rows
        scores = logits.float()
        num_real_rows = min(max(vocab_size - first, 0), rows)
        if num_real_rows < rows:  # rows that only pad the vocabulary are no part of any softmax
            scores = scores.clone() if scores is logits else scores
            scores[:, num_real_rows:] = float("-inf")
        maximum = (
            scores.max(dim=-1).values
            if num_real_rows
            else torch.full(scores.shape[:1], float("-inf"), device=scores.device)
        )
        distributed.all_reduce(maximum, op=distributed.ReduceOp.MAX, group=tp_group)
        exponentials = (scores - maximum[:, None]).exp_()
        normaliser = exponentials.sum(dim=-1)
        distributed.all_reduce(normaliser, group=tp_group)
        local_targets = targets - first
        is_local = (local_targets >= 0) & (local_targets < num_real_rows)
        local_targets = torch.where(is_local, local_targets, 0)
        chosen = scores.gather(-1, local_targets[:, None]).squeeze(-1) - maximum
        chosen = torch.where(is_local, chosen, 0.0)
        distributed.all_reduce(chosen, group=tp_group)
        ctx.save_for_backward(exponentials.div_(normaliser[:, None]), local_targets, is_local)
        ctx.logits_dtype = logits.dtype
        return chosen - normaliser.log()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, local_targets, is_local = ctx.saved_tensors
        grad = probabilities.mul_(-grads[0][:, None])
        grad.scatter_add_(-1, local_targets[:, None], torch.where(is_local, grads[0], 0.0)[:, None])
        return grad.to(ctx.logits_dtype), None, None, None


def token_logps(logits: Tensor, targets: Tensor, *, vocab_size: int, tp_group: Any) -> Tensor:
    """Log-probability of each target token, in nats.

    All ranks of `tp_group` must call.

    Args:
        logits: [N, V/TP], this rank's contiguous slice of the vocabulary; any float dtype.
        targets: [N] int64, ids below `vocab_size`, the same on all ranks of the group.
        vocab_size: Rows of the vocabulary that are tokens; rows at and above it pad the
            weight and get probability 0 and gradient 0.
        tp_group: Tensor-parallel process group.

    Returns:
        [N] float32, the same on all ranks of the group.
    """
    result: Tensor = _VocabParallelLogps.apply(logits, targets, vocab_size, tp_group)
    return result


def sequence_logps(logps: Tensor, target_sequences: Tensor, num_sequences: int) -> Tensor:
    """Sums token log-probabilities into one value per sequence.

    Args:
        logps: [N] float32.
        target_sequences: [N] int64; the sequence each token belongs to.
        num_sequences: B.

    Returns:
        [B] float32.
    """
    sums = torch.zeros(num_sequences, dtype=logps.dtype, device=logps.device)
    return sums.index_add(0, target_sequences, logps)
