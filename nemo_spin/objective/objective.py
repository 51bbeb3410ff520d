"""What an iteration minimises: one of the losses, and the options it is combined with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nemo_spin.objective.losses import LOSSES, Loss, PairLogps, margin, rewards
from nemo_spin.objective.neighbours import NEIGHBOURS, PairLoss
from nemo_spin.objective.options import (
    BaseLogps,
    PairLengths,
    mixed_opponent,
    nll_per_token,
    penalised,
    per_token,
    smoothed,
)
from nemo_spin.objective.user_loss import load_user_loss


@dataclass(frozen=True)
class Objective:
    """loss(penalised(per_token(mixed_opponent(pair)))) + sft_weight * NLL; see `build_objective`.

    Attributes:
        loss: Of a pair, label smoothing included.
        beta: The paper's lambda.
        length_normalized, sft_weight, dpop_weight, opponent_mix: See `build_objective`.
        identical_count: Whether a pair of twice the same response has a gradient.
    """

    loss: PairLoss
    beta: float
    length_normalized: bool = False
    sft_weight: float = 0.0
    dpop_weight: float = 0.0
    opponent_mix: float = 0.0
    identical_count: bool = True

    def __call__(self, logps: PairLogps, lengths: PairLengths, base: BaseLogps | None = None) -> Tensor:
        """The loss of each pair.

        Args:
            logps: Sums over response tokens; the opponent is theta_t.
            lengths: Tokens of the responses.
            base: theta_0's sums; needed where `needs_base`.

        Returns:
            [pairs], dtype of the policy's log-probabilities.
        """
        pairs = self._compared(logps, lengths, base)
        if self.dpop_weight:
            pairs = penalised(pairs, self.dpop_weight)
        losses = self.loss(pairs, self.beta)
        if self.sft_weight:
            losses = losses + self.sft_weight * nll_per_token(logps.policy_real, lengths.real)
        return losses

    def margins(self, logps: PairLogps, lengths: PairLengths, base: BaseLogps | None = None) -> Tensor:
        """The margin the loss is about, before a DPOP penalty: positive where the pair is told apart.

        Returns:
            [pairs], without gradient.
        """
        return margin(self._compared(logps, lengths, base), self.beta).detach()

    def rewards(
        self, logps: PairLogps, lengths: PairLengths, base: BaseLogps | None = None
    ) -> tuple[Tensor, Tensor]:
        """The implicit rewards of both responses; the margin is their difference.

        Returns:
            Real and generated, each [pairs], without gradient.
        """
        real, generated = rewards(self._compared(logps, lengths, base), self.beta)
        return real.detach(), generated.detach()

    def at_start(self, logps: PairLogps, lengths: PairLengths, base: BaseLogps | None = None) -> Tensor:
        """What the losses of these pairs were while the policy was still its opponent.

        The paper's losses, alone, have one value there (the logistic one ln 2); with an NLL
        term or a mixed opponent it differs from pair to pair.

        Returns:
            [pairs], without gradient.
        """
        start = logps._replace(policy_real=logps.opponent_real, policy_generated=logps.opponent_generated)
        return self(start, lengths, base).detach()

    @property
    def needs_base(self) -> bool:
        """Whether theta_0's log-probabilities are needed."""
        return self.opponent_mix > 0.0

    def _compared(self, logps: PairLogps, lengths: PairLengths, base: BaseLogps | None) -> PairLogps:
        if self.opponent_mix:
            assert base is not None, "a mixed opponent needs theta_0's log-probabilities"
            logps = mixed_opponent(logps, base, self.opponent_mix)
        return per_token(logps, lengths) if self.length_normalized else logps


def build_objective(
    *,
    loss: str,
    beta: float,
    length_normalized: bool = False,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    dpop_weight: float = 0.0,
    opponent_mix: float = 0.0,
) -> Objective:
    """The objective of one iteration.

    Args:
        loss: A name of `LOSSES` or `NEIGHBOURS`, or a user's own function, as
            `package.module:function` or `path/to/file.py:function` (`user_loss.py`).
        beta: The paper's lambda, of this iteration.
        length_normalized: Means over tokens in place of sums (`options.per_token`).
        label_smoothing: Share of labels taken to be wrong, below 1/2 (`options.smoothed`).
        sft_weight: Of the real responses' NLL per token (`options.nll_per_token`).
        dpop_weight: Of falling real log-probabilities (`options.penalised`).
        opponent_mix: theta_0's weight in the opponent, 0 to 1 (`options.mixed_opponent`).

    Raises:
        ConfigError: `loss` names a function that is not there or cannot be used.
    """
    pair_loss = _pair_loss(loss)
    return Objective(
        loss=smoothed(pair_loss, label_smoothing) if label_smoothing else pair_loss,
        beta=beta,
        length_normalized=length_normalized,
        sft_weight=sft_weight,
        dpop_weight=dpop_weight,
        opponent_mix=opponent_mix,
        # Such a pair's margin is 0 whatever the policy; all but NCA and a user's loss see it alone.
        identical_count=bool(sft_weight or dpop_weight or (loss not in LOSSES and loss != "ipo")),
    )


@dataclass(frozen=True)
class OfMargin:
    """A loss of the margin as a loss of the pair."""

    loss: Loss

    def __call__(self, logps: PairLogps, beta: float) -> Tensor:
        """Applies it to the pair's margin."""
        return self.loss(margin(logps, beta))


def _pair_loss(name: str) -> PairLoss:
    if name in LOSSES:
        return OfMargin(LOSSES[name])
    if name in NEIGHBOURS:
        return NEIGHBOURS[name]
    return load_user_loss(name)
