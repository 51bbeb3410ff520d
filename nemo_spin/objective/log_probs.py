"""From log-probabilities of tokens to those of responses."""

from __future__ import annotations

import torch
from torch import Tensor


def response_sums(token_logps: Tensor, target_responses: Tensor, num_responses: int) -> Tensor:
    """Sums over the tokens of each response, its closing EOS included and the prompt excluded.

    Args:
        token_logps: [tokens] float32, in nats.
        target_responses: [tokens] int64; the response each token belongs to.
        num_responses: Q.

    Returns:
        [Q] float32, differentiable.
    """
    sums = torch.zeros(num_responses, dtype=token_logps.dtype, device=token_logps.device)
    return sums.index_add(0, target_responses, token_logps)
