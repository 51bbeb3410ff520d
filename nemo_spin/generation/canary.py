"""Known log-probabilities of a few texts: whether an engine holds the weights it should.

An engine whose weights were exchanged may answer from others without a sign of it. So
Megatron leaves, with every model it exports, the log-probabilities of a few texts under
exactly those weights; whoever loads them into an engine asks it for the same numbers
before it answers anything. The sampler gate compares all answers afterwards; the canary
saves drawing them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_spin.data.files import write_json
from nemo_spin.errors import GateError, explain

# Mean absolute difference, nats per token, between an engine's and Megatron's numbers for
# the same weights in the same precision; measured differences are below 1e-4 in float32 and
# about 1e-2 in bfloat16. With 8-bit products Megatron rounds what an engine does not. The
# sampler gate uses them too.
TOLERANCES = {"32": 1e-3, "bf16": 5e-2, "fp8": 2e-1}


@dataclass(frozen=True)
class CanaryText:
    """A prompt, a response, and what the model thinks of the response.

    Attributes:
        prompt_ids: At least one token.
        response_ids: At least one token.
        logp: Sum of the response's log-probabilities, in nats, by Megatron.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    logp: float


@dataclass(frozen=True)
class Canary:
    """What an engine that holds the right weights has to say.

    Attributes:
        precision: Megatron's, a key of `TOLERANCES`.
        texts: A few.
    """

    precision: str
    texts: tuple[CanaryText, ...]

    def within(self, max_model_len: int) -> Canary:
        """The same without texts that an engine cannot take: it draws one token after each."""
        fitting = tuple(
            text for text in self.texts if len(text.prompt_ids) + len(text.response_ids) + 1 <= max_model_len
        )
        return Canary(self.precision, fitting)

    def token_ids(self) -> list[list[int]]:
        """The texts as an engine is asked about them."""
        return [text.prompt_ids + text.response_ids for text in self.texts]

    def difference(self, logps: Sequence[Sequence[float]]) -> float:
        """Mean over the texts of |engine - Megatron| per response token, in nats.

        Args:
            logps: For each text the log-probability of every token but the first.
        """
        differences = [
            abs(math.fsum(values[-len(text.response_ids) :]) - text.logp) / len(text.response_ids)
            for text, values in zip(self.texts, logps, strict=True)
        ]
        return math.fsum(differences) / len(differences)


def write_canary(path: Path, canary: Canary) -> None:
    """Replaces `path` by the canary, atomically."""
    write_json(path, asdict(canary))


def read_canary(path: Path) -> Canary | None:
    """The canary in `path`; None where there is none that can be used."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        texts = tuple(CanaryText(**text) for text in plain["texts"])
        return Canary(str(plain["precision"]), texts) if texts else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def check_difference(model_dir: str, difference: float, tolerance: float) -> None:
    """Compares what the engine said with what is allowed.

    Raises:
        GateError: It is above the tolerance, or no number.
    """
    if difference <= tolerance:
        return
    raise GateError(
        explain(
            f"canary of {model_dir} (spin.gates.sampler_tolerance)",
            found=f"the engine and Megatron differ by {difference:.2g} nats per token",
            rule=f"at most {tolerance:g}: an engine answers with the weights that were trained",
            remedy="look at the weights, the precision (generation.dtype) and the RoPE settings of the "
            "served directory; spin.gates.sampler=false turns the comparison off",
        )
    )
