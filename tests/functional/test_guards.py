"""Guards over answers and scores fire where a model really fails: it is trained to, in a second.

`transformers` draws the answers here in the sampler's place: what guards look at are token
ids, whoever drew them. The guards over steps are tested on real trainings in
`tests/distributed/model/test_fit.py`, the one over a scoring in
`tests/distributed/selfplay/test_score.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_spin.config.schema import GuardsConfig
from nemo_spin.data.columns import GENERATED
from nemo_spin.generation.counts import count_answers
from nemo_spin.selfplay.guards import of_answers, of_evaluation
from tests import models

PROMPTS, LIMIT, STEPS = 8, 20, 40


@dataclass
class Player:
    """A model that was trained on some responses to the prompts, until it gives them."""

    model: Any
    end: int
    prompts: list[list[int]]
    reals: list[list[int]]

    def answers(self, *, samples: int = 1) -> pa.Table:
        """Greedy answers, each prompt `samples` times."""
        rows = []
        for number, (prompt, real) in enumerate(zip(self.prompts, self.reals, strict=True)):
            with torch.no_grad():
                drawn = self.model.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    do_sample=False,
                    max_new_tokens=LIMIT,
                    eos_token_id=self.end,
                    pad_token_id=0,
                )[0, len(prompt) :].tolist()
            reason = "stop" if drawn[-1] == self.end else "length"
            rest = {"iteration": 0, "sampler_logps": 0.0, "opponent_sha256": ""}
            row = {"id": str(number), "prompt_ids": prompt, "real_ids": real, "generated_ids": drawn}
            row |= {"finish_reason": reason, "num_sampler_tokens": len(drawn), **rest}
            rows += [{**row, "sample": sample} for sample in range(samples)]
        return pa.Table.from_pylist(rows, GENERATED)

    def evaluation(self) -> dict[str, Any]:
        """Exact match, as `evaluation.scorer` would have it."""
        return {"greedy": {"score": count_answers([self.answers()])["equal_share"]}}


class Players:
    """Makes players out of one random model."""

    def __init__(self, directory: Path) -> None:
        self._directory = models.write_model(directory)
        tokenizer = AutoTokenizer.from_pretrained(self._directory)
        self.end = int(tokenizer.eos_token_id)
        rows = {row["messages"][0]["content"]: row["messages"] for row in models.demonstrations(99)}
        chosen = list(rows.values())[:PROMPTS]
        self.prompts = [tokenizer.encode(f"<|user|>{user['content']}<|assistant|>") for user, _ in chosen]
        self.reals = [[*tokenizer.encode(answer["content"])[: LIMIT - 1], self.end] for _, answer in chosen]

    def trained_on(self, responses: Sequence[list[int]]) -> Player:
        model = AutoModelForCausalLM.from_pretrained(self._directory, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(STEPS):
            losses = []
            for prompt, response in zip(self.prompts, responses, strict=True):
                ids = torch.tensor([[*prompt, *response]])
                labels = ids.clone()
                labels[:, : len(prompt)] = -100
                losses.append(model(ids, labels=labels).loss)
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
        return Player(model.eval(), self.end, self.prompts, self.reals)


@pytest.fixture(scope="module")
def players(tmp_path_factory: pytest.TempPathFactory) -> Players:
    return Players(tmp_path_factory.mktemp("players") / "model")


@pytest.fixture(scope="module")
def finished(players: Players) -> Player:
    """Gives the demonstrations themselves: it has learnt all there is."""
    return players.trained_on(players.reals)


@pytest.fixture(scope="module")
def silent(players: Players) -> Player:
    """Ends at once."""
    return players.trained_on([[players.end]] * PROMPTS)


@pytest.fixture(scope="module")
def endless(players: Players) -> Player:
    """Was fine-tuned on responses without their end, and says one word over and over."""
    return players.trained_on([real[:1] * LIMIT for real in players.reals])


def fired(player: Player, before: Player | None = None, *, samples: int = 1) -> dict[str, str]:
    """Guard -> level."""
    counts = count_answers([player.answers(samples=samples)])
    earlier = count_answers([before.answers()]) if before else {}
    return {entry.guard: entry.level for entry in of_answers(counts, earlier, GuardsConfig())}


def test_nothing_is_left_to_learn(finished: Player) -> None:
    assert fired(finished) == {"equal_share": "stop"}


def test_several_samples_of_a_sure_model_are_one(finished: Player) -> None:
    assert fired(finished, samples=2) == {"equal_share": "stop", "duplicate_share": "warn"}


def test_a_model_that_says_nothing(silent: Player, finished: Player) -> None:
    expected = {"empty_share": "stop", "distinct_share": "warn", "length_drift": "warn"}
    assert fired(silent) == expected
    assert fired(silent, finished) == {**expected, "equal_fall": "warn"}


def test_a_model_without_an_end(endless: Player) -> None:
    found = fired(endless)
    assert found.pop("length_drift", "warn") == "warn"
    assert found.pop("distinct_share", "warn") == "warn"
    assert found == {"cut_share": "warn", "eos_share": "warn", "repetitive_share": "warn"}


def test_an_iteration_that_made_it_worse(finished: Player, silent: Player) -> None:
    assert of_evaluation(finished.evaluation(), silent.evaluation(), GuardsConfig()) == []
    (finding,) = of_evaluation(silent.evaluation(), finished.evaluation(), GuardsConfig())
    assert (finding.guard, finding.level) == ("score_drop", "stop")
