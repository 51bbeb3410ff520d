"""The sampler gate: answers were drawn by the model that is trained."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nemo_spin.errors import GateError, explain
from nemo_spin.generation.canary import TOLERANCES
from nemo_spin.selfplay.ranks.context import StageContext

GATE_COLUMNS = ("iteration", "num_sampler_tokens", "sampler_logps", "opponent_generated_logps")


class SamplerGate:
    """Compares the sampler's log-probabilities of its own answers with Megatron's.

    Sampler values never enter the loss; they show whether the weights, the template and
    the positions that were served are those that are trained.
    """

    def __init__(self, context: StageContext) -> None:
        gates = context.config.spin.gates
        self._enabled = gates.sampler
        tolerance = gates.sampler_tolerance
        self._tolerance = TOLERANCES[context.agreement] if tolerance is None else tolerance
        self._iteration = context.iteration
        self._differences: list[np.ndarray] = []

    def add(self, table: pa.Table) -> None:
        """Takes the answers of this iteration's opponent; earlier ones had other weights.

        Args:
            table: Scored rows, of which `GATE_COLUMNS` are looked at.
        """
        mine = table.filter(pc.equal(table["iteration"], self._iteration))
        mine = mine.filter(pc.greater(mine["num_sampler_tokens"], 0))  # others came with the data
        tokens = mine["num_sampler_tokens"].to_numpy()
        difference = mine["sampler_logps"].to_numpy() - mine["opponent_generated_logps"].to_numpy()
        self._differences.append(np.abs(difference) / tokens)

    @property
    def difference(self) -> float:
        """Mean absolute difference per token, over responses; 0 without any."""
        values = np.concatenate(self._differences) if self._differences else np.zeros(0)
        return float(values.mean()) if len(values) else 0.0

    def counts(self) -> dict[str, float]:
        """For the manifest."""
        return {"sampler_difference": self.difference}

    def check(self) -> None:
        """Raises GateError where the difference is above the tolerance, or is not a number."""
        if not self._enabled or self.difference <= self._tolerance:
            return
        raise GateError(
            explain(
                "sampler gate (spin.gates.sampler_tolerance)",
                found=f"sampler and Megatron differ by {self.difference:.2g} nats per token",
                rule=f"at most {self._tolerance:g}: answers are drawn by the model that is trained",
                remedy="look at the weights, precision (generation.dtype), RoPE settings and stop tokens "
                "of the served directory; remove generated/ and scored/ of this iteration to redo them",
            )
        )
