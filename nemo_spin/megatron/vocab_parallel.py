"""The output layer and the log-softmax in one, without ever holding the logits.

Only positions that predict a response token reach the vocabulary. Their logits exist in
blocks of many tokens by a few vocabulary rows, so that the weight is read once and its
gradient is written once for thousands of tokens; the backward pass computes a block
again instead of keeping it.

Legend: N predicted tokens, H hidden size, V vocabulary (padded), TP tensor-parallel size;
n tokens by r rows of the vocabulary make a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, distributed

_LOGITS_PER_BLOCK = 1 << 24  # float32 logits of this rank alive at a time: 64 MiB
_TOKENS_PER_BLOCK = 1 << 12  # at most; more would make blocks too narrow for fast products


def withhold_logits(gpt: Any, *, logit_cap: float | None = None) -> None:
    """Makes a GPTModel of the last stage return its hidden states in place of logits.

    Its `logit_cap` tells whoever forms logits that they are capped (see `logps_without_logits`).

    GPTModel applies its output layer to every position. Its output layer keeps its
    weight, its checkpoint entries and its place; only its forward is the identity here.
    """

    def identity(
        input_: Tensor, weight: Any = None, runtime_gather_output: Any = None
    ) -> tuple[Tensor, None]:
        return input_, None

    gpt.output_layer.forward = identity
    gpt.logit_cap = logit_cap


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
    logit_cap: float | None = None,
) -> Tensor:
    """Log-probabilities of the response tokens of a microbatch. All ranks of `tp_group` must call.

    Args:
        hidden_states: [B, S, H] after the last norm, or [B, S/TP, H] under sequence parallelism.
        weight: [V/TP, H].
        positions: [N] int64; b * S + s of the position that predicts each token.
        targets: [N] int64; see `logps_without_logits`.
        vocab_size: Rows of the vocabulary that are tokens.
        sequence_parallel: Whether the positions of `hidden_states` are split over the group.
        logit_cap: See `logps_without_logits`.

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
    return logps_without_logits(
        chosen, weight, targets, vocab_size=vocab_size, tp_group=tp_group, logit_cap=logit_cap
    )


def logps_without_logits(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    tp_group: Any,
    logit_cap: float | None = None,
) -> Tensor:
    """log softmax(hidden @ weight^T)[target] over a vocabulary split over ranks.

    Three all-reduces of N numbers forward, none backward: the gradient for `hidden` is
    this rank's partial sum, the caller reduces it.

    A weight that Megatron's data parallelism manages has its gradient added to its float32
    `main_grad` as the blocks are computed, the way Megatron's fused layers do it: no second
    gradient of the vocabulary's size, no rounding to bfloat16 between microbatches.

    Args:
        hidden: [N, H], the same on all ranks of the group; float32 or bfloat16.
        weight: [V/TP, H], this rank's slice of the vocabulary; dtype of `hidden`.
        targets: [N] int64, ids below `vocab_size`.
        vocab_size: Rows at and above it pad the vocabulary: probability 0, gradient 0.
        tp_group: Tensor-parallel process group.
        logit_cap: Logits z become cap * tanh(z / cap) (arXiv 2408.00118); None: they do not.

    Returns:
        [N] float32; statistics and sums are float32 whatever the inputs.
    """
    result: Tensor = _LogpsWithoutLogits.apply(hidden, weight, targets, vocab_size, tp_group, logit_cap)
    return result


class _LogpsWithoutLogits(torch.autograd.Function):
    """With p = softmax(z), d log p[target] / dz = onehot(target) - p, formed again block by block.

    Where z = cap * tanh(y / cap), dz/dy = 1 - (z / cap)^2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        tp_group: Any,
        logit_cap: float | None,
    ) -> Tensor:
        first = distributed.get_rank(tp_group) * weight.shape[0]
        tokens = weight[: max(vocab_size - first, 0)]  # without rows that only pad the vocabulary
        local = targets - first
        blocks = _Blocks(hidden, tokens, local, logit_cap)
        # The sum of exp(z - maximum) over the rows seen so far, kept while the maximum rises.
        maximum = hidden.new_full(targets.shape, float("-inf"), dtype=torch.float32)
        total, picked = torch.zeros_like(maximum), torch.zeros_like(maximum)
        for part, rows in blocks:
            logits = blocks.logits(part, rows)
            is_here, column = blocks.targets(part, rows)
            picked[part] += torch.where(is_here, logits.gather(-1, column).squeeze(-1), 0.0)
            higher = torch.maximum(maximum[part], logits.amax(dim=-1))
            total[part] *= (maximum[part] - higher).exp_()
            total[part] += logits.sub_(higher[:, None]).exp_().sum(dim=-1)
            maximum[part] = higher
        highest = maximum.clone()
        distributed.all_reduce(highest, op=distributed.ReduceOp.MAX, group=tp_group)
        total *= (maximum - highest).exp_()
        distributed.all_reduce(total, group=tp_group)
        distributed.all_reduce(picked, group=tp_group)
        log_normaliser = total.log_().add_(highest)
        ctx.save_for_backward(hidden, weight, log_normaliser, local)
        ctx.num_tokens, ctx.logit_cap = tokens.shape[0], logit_cap
        return picked - log_normaliser

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        hidden, weight, log_normaliser, local = ctx.saved_tensors
        blocks = _Blocks(hidden, weight[: ctx.num_tokens], local, ctx.logit_cap)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = _WeightGradient(weight) if ctx.needs_input_grad[1] else None
        for part, rows in blocks:
            grad = grads[0][part]
            is_here, column = blocks.targets(part, rows)
            logits = blocks.logits(part, rows)
            slopes = None if ctx.logit_cap is None else 1.0 - (logits / ctx.logit_cap).square_()
            # in place: logits -> probabilities -> gradient of the logits
            grad_logits = logits.sub_(log_normaliser[part, None]).exp_().mul_(-grad[:, None])
            grad_logits.scatter_add_(-1, column, torch.where(is_here, grad, 0.0)[:, None])
            if slopes is not None:
                grad_logits.mul_(slopes)
            grad_logits = grad_logits.to(hidden.dtype)
            _add_product(grad_hidden[part], grad_logits, weight[rows])
            if grad_weight is not None:
                _add_product(grad_weight.sum[rows], grad_logits.t(), hidden[part])
        returned = grad_weight.finish() if grad_weight is not None else None
        return grad_hidden.to(hidden.dtype), returned, None, None, None, None


class _Blocks:
    """Yields (tokens, rows) that cover all logits, and forms the logits of one block at a time.

    Args:
        hidden: [N, H].
        weight: [V', H]; rows of this rank that are tokens.
        local: [N] int64; targets as rows of `weight`, out of range where they are another rank's.
        logit_cap: See `logps_without_logits`.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, local: Tensor, logit_cap: float | None) -> None:
        self._logit_cap = logit_cap
        self._hidden, self._weight, self._local = hidden, weight, local
        self._num_tokens = min(max(hidden.shape[0], 1), _TOKENS_PER_BLOCK)
        self._num_rows = min(max(_LOGITS_PER_BLOCK // self._num_tokens, 1), max(weight.shape[0], 1))
        self._buffer = hidden.new_empty(self._num_tokens * self._num_rows, dtype=torch.float32)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for part in _slices(self._hidden.shape[0], self._num_tokens):
            for rows in _slices(self._weight.shape[0], self._num_rows):
                yield part, rows

    def logits(self, part: slice, rows: slice) -> Tensor:
        """[n, r] float32, in memory that the next block overwrites."""
        hidden, weight = self._hidden[part], self._weight[rows]
        shape = hidden.shape[0], weight.shape[0]
        logits = self._buffer[: shape[0] * shape[1]].view(shape)
        if hidden.dtype == logits.dtype:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            logits.copy_(hidden @ weight.t())
        if self._logit_cap is not None:
            logits.div_(self._logit_cap).tanh_().mul_(self._logit_cap)
        return logits

    def targets(self, part: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """[n] bool, whether a token's target is among `rows`, and [n, 1] int64, which one (or 0)."""
        column = self._local[part] - rows.start
        is_here = (column >= 0) & (column < rows.stop - rows.start)
        return is_here, torch.where(is_here, column, 0)[:, None]


class _WeightGradient:
    """Where the gradient of a weight is summed, in float32: [V/TP, H] of its own, or its `main_grad`."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._main_grad: Tensor | None = getattr(weight, "main_grad", None)
        self.sum = (
            torch.zeros_like(weight, dtype=torch.float32) if self._main_grad is None else self._main_grad
        )

    def finish(self) -> Tensor | None:
        """What autograd gets; of a `main_grad`, a stand-in that Megatron's hook throws away."""
        if self._main_grad is None:
            return self.sum.to(self._weight.dtype)
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        if getattr(self._weight, "zero_out_wgrad", False):
            return None  # an embedding on this stage too: the hook still adds that part
        # Overlapped reduction wants a gradient; this one has a single number.
        self._weight.grad = self._weight.new_zeros(()).expand_as(self._weight)
        return None


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; `total` is float32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
