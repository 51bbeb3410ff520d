"""What a sampler returned, checked for all that later stages rely on."""

from __future__ import annotations

import math

from nemo_spin.errors import GenerationError, explain
from nemo_spin.generation.engine import Answer, Prompt, Sampling


def checked_answer(
    token_ids: list[int], logps: list[float], finish_reason: object, *, prompt: Prompt, sampling: Sampling
) -> Answer:
    """The answer to a prompt.

    Args:
        token_ids: As sampled.
        logps: Log-probability of each, in nats.
        finish_reason: The sampler's word for why it ended.
        prompt: What was asked.
        sampling: How.

    Raises:
        GenerationError: It did not end as `sampling` says, or its numbers are no probabilities.
    """
    stops = [position for position, token in enumerate(token_ids) if token in sampling.stop_token_ids]
    match finish_reason:
        case "stop":
            is_sound = stops == [len(token_ids) - 1]
        case "length":
            is_sound = not stops and len(token_ids) == prompt.max_tokens
        case reason:
            raise unexpected(f"an answer that ended by {reason!r}")
    if not is_sound:
        raise unexpected(
            f"an answer of {len(token_ids)} tokens (at most {prompt.max_tokens}), "
            f"stop tokens at {stops[:5]}, that ended by {finish_reason!r}"
        )
    if len(logps) != len(token_ids):
        raise unexpected("an answer without the log-probability of each token")
    if not all(map(math.isfinite, logps)):
        raise _not_finite()
    return Answer(token_ids, logps, str(finish_reason))


def _not_finite() -> GenerationError:
    return GenerationError(
        explain(
            "vLLM",
            found="drew tokens whose log-probability is not a finite number",
            rule="a model gives every token it draws a probability",
            remedy="its numbers overflow: try generation.dtype=float32, or look at the model's weights",
        )
    )


def unexpected(found: str) -> GenerationError:
    """A sampler returned something else than what it is known to return."""
    return GenerationError(
        explain(
            "vLLM",
            found=f"returned {found}",
            rule="each prompt gets one answer that ends with its first stop token, or is cut at the limit",
            remedy="use a version of vLLM this package was tested with (pyproject.toml names it)",
        )
    )
