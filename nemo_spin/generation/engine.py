"""What this package asks of a sampler, whichever it is.

An engine answers token ids with token ids. One implementation lives in the worker's
process (`vllm_offline`), one speaks to a server (`vllm_server`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nemo_spin.generation.request import EngineSettings  # which needs `Sampling` from here


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_p: Tokens are drawn from the smallest set that has this share of probability.
        top_k: Tokens are drawn from the k likeliest; 0: from all.
        max_tokens: An answer is cut after as many tokens.
        stop_token_ids: An answer ends with the first of them, which belongs to it.
    """

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """One request: the same one always gets the same answer.

    Attributes:
        token_ids: The prompt, as the trainer sees it too.
        seed: Of this request alone (`seeds.request_seed`).
        max_tokens: Of this request: less than `Sampling.max_tokens` where the context ends before.
    """

    token_ids: list[int]
    seed: int
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """What an engine drew for one prompt.

    Attributes:
        token_ids: As sampled, the stop token included.
        logps: Log-probability of each token, in nats, under the model itself: before
            temperature, top-p and top-k.
        finish_reason: `stop`, or `length` where a limit cut the answer.
    """

    token_ids: list[int]
    logps: list[float]
    finish_reason: str


class Engine(Protocol):
    """A loaded model that answers prompts.

    Attributes:
        is_new: Whether it was started for its first weights, or was there and took them.
        device: What it computes on: `cpu`, the kind of accelerator, or `server`.
        can_refresh: Whether `refresh` is something it can do.
    """

    is_new: bool
    device: str
    can_refresh: bool

    def answer(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_done: Callable[[int], None]
    ) -> list[Answer]:
        """Answers all prompts, in their order.

        The answers depend on `prompts` and `sampling` alone, not on earlier calls.

        Args:
            prompts: The requests.
            sampling: Holds for all of them.
            on_done: Told the number of prompts answered since it was last told.
        """

    def logps(self, texts: Sequence[list[int]]) -> list[list[float]]:
        """Log-probability, in nats, of every token of each text but its first."""

    def refresh(self, settings: EngineSettings) -> None:
        """Takes the weights of another directory of the same architecture, or another adapter.

        After an exception the engine is not to be used any more.

        Args:
            settings: Those of the engine (`EngineSettings.fits`), with other weights.
        """
