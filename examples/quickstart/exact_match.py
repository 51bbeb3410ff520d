"""The quickstart's scorer: an answer is right or wrong."""

from __future__ import annotations


def score(prompt: str, real: str, response: str) -> float:
    """1 if the response is the demonstrated answer, apart from white space around it; else 0.

    Args:
        prompt: The prompt as the template rendered it.
        real: The demonstrated answer.
        response: The model's answer.
    """
    return float(response.strip() == real.strip())
