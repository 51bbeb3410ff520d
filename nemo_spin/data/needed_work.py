"""What a set of units needs computed, whichever way it is packed: the base of every rate that is reported."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nemo_spin.data.datasets import Units


@dataclass(frozen=True)
class Needed:
    """Of some units, each with its prompt computed once.

    Attributes:
        pairs: Of a real and a generated response; 0 in plain fine-tuning.
        tokens: Of prompts and responses.
        response_tokens: Those that are predicted.
        repeated_prompt_tokens: What a copy of the prompt before every response would add.
        attended: Pairs of a query and a key it sees (`Units.attended_pairs`).
    """

    pairs: int
    tokens: int
    response_tokens: int
    repeated_prompt_tokens: int
    attended: int


class NeededWork:
    """The needed work of every unit of a table, added up on request.

    Args:
        units: The table.
    """

    def __init__(self, units: Units) -> None:
        prompt, responses, number = units.token_counts().T
        self._columns = np.stack(
            [number - 1, prompt + responses, responses, prompt * (number - 1), units.attended_pairs()]
        )

    def of(self, indices: np.ndarray) -> Needed:
        """Of the units `indices`, each as often as it stands there."""
        return Needed(*self._columns[:, indices].sum(axis=1).tolist())
