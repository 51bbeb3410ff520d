"""The output layer and the log-softmax in one, without ever holding the logits.

Only positions that predict a response token reach the vocabulary; they are taken a few
at a time, and the backward pass computes their logits again instead of keeping them.

Legend: N predicted tokens, H hidden size, V vocabulary (padded), TP tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, distributed

_LOGITS_PER_CHUNK = 1 << 24  # float32 logits of this rank alive at a time: 64 MiB


def withhold_logits(gpt: Any) -> None:
    """Makes a GPTModel of the last stage return its hidden states in place of logits.

    GPTModel applies its output layer to every position. Its output layer keeps its
    weight, its checkpoint entries and its place; only its forward is the identity here.
    """

    def identity(
        input_: Tensor, weight: Any = None, runtime_gather_output: Any = None
    ) -> tuple[Tensor, None]:
        return input_, None

    gpt.output_layer.forward = identity


def output_weight(gpt: Any) -> Tensor:
    """[V/TP, H]: the output layer's weight, or the embedding's where they are tied."""
    weight: Tensor = (
        gpt.shared_embedding_or_output_weight()
        if gpt.share_embeddings_and_output_weights
        else gpt.output_layer.weight
    )
    return weight


def response_logps(
    hidden_states: Tensor,
    weight: Tensor,
    *,
    positions: Tensor,
    targets: Tensor,
    vocab_size: int,
    sequence_parallel: bool,
    tp_group: Any,
) -> Tensor:
    """Log-probabilities of the response tokens of a microbatch. All ranks of `tp_group` must call.

    Args:
        hidden_states: [B, S, H] after the last norm, or [B, S/TP, H] under sequence parallelism.
        weight: [V/TP, H].
        positions: [N] int64; b * S + s of the position that predicts each token.
        targets: [N] int64; see `logps_without_logits`.
        vocab_size: Rows of the vocabulary that are tokens.
        sequence_parallel: Whether the positions of `hidden_states` are split over the group.

    Returns:
        [N] float32, the same on all ranks of the group.
    """
    if sequence_parallel:
        # backward: each rank's gradient is a partial sum, reduced while it is scattered
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states.transpose(0, 1).contiguous(), tensor_parallel_output_grad=True, group=tp_group
        ).transpose(0, 1)
        chosen = hidden_states.flatten(0, 1).index_select(0, positions)
    else:
        chosen = hidden_states.flatten(0, 1).index_select(0, positions)
        chosen = copy_to_tensor_model_parallel_region(chosen, group=tp_group)
    return logps_without_logits(chosen, weight, targets, vocab_size=vocab_size, tp_group=tp_group)


def logps_without_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, tp_group: Any
) -> Tensor:
    """log softmax(hidden @ weight^T)[target] over a vocabulary split over ranks.

    Three all-reduces of a few tokens each per chunk forward, none backward: the gradient
    for `hidden` is this rank's partial sum, the caller reduces it.

    Args:
        hidden: [N, H], the same on all ranks of the group; float32 or bfloat16.
        weight: [V/TP, H], this rank's slice of the vocabulary; dtype of `hidden`.
        targets: [N] int64, ids below `vocab_size`.
        vocab_size: Rows at and above it pad the vocabulary: probability 0, gradient 0.
        tp_group: Tensor-parallel process group.

    Returns:
        [N] float32; statistics and sums are float32 whatever the inputs.
    """
    result: Tensor = _LogpsWithoutLogits.apply(hidden, weight, targets, vocab_size, tp_group)
    return result


class _LogpsWithoutLogits(torch.autograd.Function):
    """With p = softmax(z), d log p[target] / dz = onehot(target) - p, formed again chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, tp_group: Any
    ) -> Tensor:
        rows = weight.shape[0]
        first = distributed.get_rank(tp_group) * rows
        real_rows = min(max(vocab_size - first, 0), rows)
        local = targets - first
        is_local = (local >= 0) & (local < real_rows)
        local = torch.where(is_local, local, 0)
        normalisers, chosen = [], []
        for part in _chunks(hidden.shape[0], rows):
            logits = _logits(hidden[part], weight, real_rows)
            own = logits.gather(-1, local[part, None]).squeeze(-1)
            chosen.append(torch.where(is_local[part], own, 0.0))
            normalisers.append(_log_normaliser(logits, tp_group))
        log_normaliser, picked = torch.cat(normalisers), torch.cat(chosen)
        distributed.all_reduce(picked, group=tp_group)
        ctx.save_for_backward(hidden, weight, log_normaliser, local, is_local)
        ctx.real_rows = real_rows
        return picked - log_normaliser

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, log_normaliser, local, is_local = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for part in _chunks(hidden.shape[0], weight.shape[0]):
            grad = grads[0][part]
            logits = _logits(hidden[part], weight, ctx.real_rows)
            # in place: logits -> probabilities -> gradient of the logits
            grad_logits = logits.sub_(log_normaliser[part, None]).exp_().mul_(-grad[:, None])
            grad_logits.scatter_add_(-1, local[part, None], torch.where(is_local[part], grad, 0.0)[:, None])
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[part] = grad_logits @ weight
            if grad_weight.dtype == hidden.dtype:
                grad_weight.addmm_(grad_logits.t(), hidden[part])
            else:
                grad_weight += grad_logits.t() @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _chunks(num_tokens: int, rows: int) -> list[slice]:
    size = max(1, _LOGITS_PER_CHUNK // max(rows, 1))
    return [slice(start, min(start + size, num_tokens)) for start in range(0, max(num_tokens, 1), size)]


def _logits(hidden: Tensor, weight: Tensor, real_rows: int) -> Tensor:
    """[n, V/TP] float32; rows that only pad the vocabulary are -inf."""
    logits = (hidden @ weight.t()).float()
    if real_rows < weight.shape[0]:
        logits[:, real_rows:] = float("-inf")
    return logits


def _log_normaliser(logits: Tensor, tp_group: Any) -> Tensor:
    """log sum exp over the whole vocabulary. [n] float32."""
    maximum = logits.max(dim=-1).values
    distributed.all_reduce(maximum, op=distributed.ReduceOp.MAX, group=tp_group)
    total = (logits - maximum[:, None]).exp_().sum(dim=-1)
    distributed.all_reduce(total, group=tp_group)
    return maximum + total.log()
