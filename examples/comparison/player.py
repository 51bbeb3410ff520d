"""What a small model on a CPU does in self-play: log-probabilities, answers, and how good they are.

The model is `transformers`' Llama in float32. A row holds a prompt once and all of its responses
behind it, each of which sees the prompt and itself: the project's shared-prompt packing, one
unit in a row.

Legend: B rows, S positions of the longest, Q responses in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from nemo_spin.data.datasets import Units
from nemo_spin.objective.log_probs import response_sums

_ROWS_AT_A_TIME = 2048  # of sampling: a bound on memory
_PADDING_ID = 0


@dataclass(frozen=True)
class Rows:
    """Units as the model takes them.

    Attributes:
        input_ids, position_ids: [B, S] int64.
        seen: [B, 1, S, S] bool: which positions each position attends to.
        positions: [tokens] int64; b * S + s of the position that predicts each response token.
        targets: [tokens] int64, the response tokens.
        responses: [tokens] int64, the response of each.
        num_responses: Q; the unit's real response first, then its generated ones.
    """

    input_ids: Tensor
    position_ids: Tensor
    seen: Tensor
    positions: Tensor
    targets: Tensor
    responses: Tensor
    num_responses: int


def lay_out(units: Units, indices: Sequence[int]) -> Rows:
    """The units `indices`, one in a row."""
    unit_runs = [[units.prompt(index), *units.responses(index)] for index in indices]
    length = max(sum(map(len, runs)) for runs in unit_runs)
    input_ids = np.full((len(unit_runs), length), _PADDING_ID, dtype=np.int64)
    position_ids = np.zeros_like(input_ids)
    run_of = np.zeros_like(input_ids)
    positions, targets, number = [], [], []
    for row, runs in enumerate(unit_runs):
        end = prompt = len(runs[0])
        input_ids[row, :end], position_ids[row, :end] = runs[0], np.arange(end)
        for run, ids in enumerate(runs[1:], start=1):
            here = slice(end, end + len(ids))
            input_ids[row, here], run_of[row, here] = ids, run
            position_ids[row, here] = np.arange(prompt, prompt + len(ids))
            predictors = np.concatenate([[prompt - 1], np.arange(end, end + len(ids) - 1)])
            positions.append(row * length + predictors)
            targets.append(ids)
            number.append(len(ids))
            end += len(ids)
        run_of[row, end:] = -1  # padding sees its like and the prompt; nothing sees it
    causal = np.tril(np.ones((length, length), dtype=bool))
    seen = causal & ((run_of[:, :, None] == run_of[:, None, :]) | (run_of[:, None, :] == 0))
    return Rows(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        seen=torch.from_numpy(seen)[:, None],
        positions=torch.from_numpy(np.concatenate(positions)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        responses=torch.from_numpy(np.repeat(np.arange(len(number)), number)),
        num_responses=len(number),
    )


def token_logits(model: Any, rows: Rows) -> Tensor:
    """[tokens, vocabulary] logits of the positions that predict response tokens."""
    hidden = model.model(
        rows.input_ids, attention_mask=rows.seen, position_ids=rows.position_ids, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[rows.positions])


def logps(model: Any, rows: Rows) -> Tensor:
    """[Q] sums over response tokens, in nats, differentiable."""
    per_token = token_logits(model, rows).log_softmax(dim=-1).gather(1, rows.targets[:, None])[:, 0]
    return response_sums(per_token, rows.responses, rows.num_responses)


@torch.no_grad()
def score(model: Any, units: Units, *, batch: int = 256) -> list[Tensor]:
    """Of each unit the sums of its responses, the real one first."""
    found: list[Tensor] = []
    for start in range(0, units.num_units, batch):
        indices = range(start, min(start + batch, units.num_units))
        sizes = [len(units.responses(index)) for index in indices]
        found += logps(model, lay_out(units, indices)).split(sizes)
    return found


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_generations: int = 1,
    temperature: float = 1.0,
    max_tokens: int,
    end_token_id: int,
    seed: Sequence[int],
) -> list[list[list[int]]]:
    """`num_generations` answers to each prompt, their end token included unless they were cut.

    Prompts of equal length go together, and each is computed once for all of its answers.
    """
    chance = torch.Generator().manual_seed(int(np.random.SeedSequence([*seed]).generate_state(1)[0]))
    answers: list[list[list[int]]] = [[] for _ in prompts]
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    size = max(1, _ROWS_AT_A_TIME // num_generations)
    for _, indices in sorted(by_length.items()):
        for start in range(0, len(indices), size):
            chosen = indices[start : start + size]
            ids = torch.tensor([prompts[index] for index in chosen])
            drawn = _draw(model, ids, num_generations, temperature, max_tokens, end_token_id, chance)
            for row, tokens in enumerate(drawn.tolist()):
                end = tokens.index(end_token_id) + 1 if end_token_id in tokens else len(tokens)
                answers[chosen[row // num_generations]].append(tokens[:end])
    return answers


def _draw(
    model: Any, ids: Tensor, copies: int, temperature: float, max_tokens: int, end: int, chance: Any
) -> Tensor:
    """[B * copies, tokens]; whatever follows an end token means nothing."""
    cache = DynamicCache(config=model.config)
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(copies)
    logits = logits.repeat_interleave(copies, dim=0)
    drawn: list[Tensor] = []
    ended = torch.zeros(len(logits), dtype=torch.bool)
    while len(drawn) < max_tokens and not bool(ended.all()):
        if drawn:
            logits = model(drawn[-1][:, None], past_key_values=cache, use_cache=True).logits[:, -1]
        if temperature:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=chance)[:, 0]
        else:
            token = logits.argmax(dim=-1)
        drawn.append(token)
        ended |= token == end
    return torch.stack(drawn, dim=1)


@torch.no_grad()
def exact_matches(model: Any, units: Units, temperatures: Sequence[float]) -> dict[str, Any]:
    """How good answers to held-out prompts are, without drawing any.

    A prompt has one right answer, so the chance that a sampled answer is right is that answer's
    probability, and the greedy one is right if each of its tokens is the likeliest there.

    Returns:
        `nll` in nats per response, `greedy`, and `sampled`: {temperature: mean chance}.
    """
    nll, greedy, sampled = 0.0, 0, dict.fromkeys(temperatures, 0.0)
    for start in range(0, units.num_units, 256):
        rows = lay_out(units, range(start, min(start + 256, units.num_units)))
        logits = token_logits(model, rows)
        missed = (logits.argmax(dim=-1) != rows.targets).float()
        greedy += int((response_sums(missed, rows.responses, rows.num_responses) == 0).sum())
        for temperature in {1.0, *temperatures}:
            chosen = (logits / temperature).log_softmax(-1).gather(1, rows.targets[:, None])[:, 0]
            sums = response_sums(chosen, rows.responses, rows.num_responses).double()
            if temperature in sampled:
                sampled[temperature] += float(sums.exp().sum())
            if temperature == 1.0:
                nll -= float(sums.sum())
    number = units.num_units
    return {
        "nll": nll / number,
        "greedy": greedy / number,
        "sampled": {temperature: total / number for temperature, total in sampled.items()},
    }
