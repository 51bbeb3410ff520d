"""A language small enough to know everything about: 3 prompts, 121 responses to each.

A response is up to four letters out of three and an end, which follows the fourth letter by
itself. A policy is a table: the logits of the next symbol (three letters, end) after each
of the 40 possible beginnings, for each prompt. It can hold any distribution over responses.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

NUM_PROMPTS, NUM_LETTERS, MAX_LETTERS = 3, 3, 4
END = NUM_LETTERS
BEGINNINGS = [b for length in range(MAX_LETTERS) for b in product(range(NUM_LETTERS), repeat=length)]
RESPONSES = [*BEGINNINGS, *product(range(NUM_LETTERS), repeat=MAX_LETTERS)]
START_KL = 1.0 / 3.0  # nats, of theta_0


def _choices() -> Tensor:
    """[responses, beginnings x symbols]: 1 for each choice that a response is made of."""
    choices = torch.zeros(len(RESPONSES), len(BEGINNINGS), NUM_LETTERS + 1, dtype=torch.float64)
    number = {beginning: i for i, beginning in enumerate(BEGINNINGS)}
    for i, response in enumerate(RESPONSES):
        symbols = response if len(response) == MAX_LETTERS else (*response, END)
        for position, symbol in enumerate(symbols):
            choices[i, number[response[:position]], symbol] = 1.0
    return choices.flatten(1)


_CHOICES = _choices()


def response_logps(table: Tensor) -> Tensor:
    """log p(y|x) of every response. [prompts, beginnings, symbols] -> [prompts, responses]."""
    return table.log_softmax(dim=-1).flatten(1) @ _CHOICES.T


def markov_table(generator: torch.Generator) -> Tensor:
    """The table of a random Markov chain: the next symbol depends on the last letter alone."""
    shape = (NUM_PROMPTS, NUM_LETTERS + 1, NUM_LETTERS + 1)
    logits = torch.randn(shape, dtype=torch.float64, generator=generator)
    last = [beginning[-1] if beginning else NUM_LETTERS for beginning in BEGINNINGS]
    return logits[:, last]


def disturbed(table: Tensor, generator: torch.Generator) -> Tensor:
    """theta_0: the table with noise of the size that makes the KL divergence START_KL."""
    noise = torch.randn(table.shape, dtype=torch.float64, generator=generator)
    data, low, high = response_logps(table), 0.0, 10.0
    for _ in range(60):  # bisection
        middle = (low + high) / 2
        if kl(data, response_logps(table + middle * noise)) < START_KL:
            low = middle
        else:
            high = middle
    return table + high * noise


def kl(data: Tensor, policy: Tensor) -> float:
    """KL(p_data || p) in nats, mean over prompts; of log-probabilities."""
    return float((data.exp() * (data - policy)).sum(dim=1).mean())


def total_variation(data: Tensor, policy: Tensor) -> float:
    """Half the absolute differences, mean over prompts; of log-probabilities."""
    return float((data.exp() - policy.exp()).abs().sum(dim=1).mean() / 2)
