"""Guards: what a stage or a step shows that self-play has gone, or is going, wrong.

Each guard looks at one number. Its thresholds are `selfplay.guards.NAME.warn` and `.stop`
in the configuration; its message says what was seen and what usually helps. None of them
needs more than the metrics that stages leave behind, so the same guards fire when a run
is looked at again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nemo_spin.config.schema import GuardsConfig, Thresholds

WARN, STOP = "warn", "stop"
Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """A guard that fired.

    Attributes:
        guard: Its name in `selfplay.guards`.
        level: `warn` or `stop`.
        value: What it saw.
        threshold: What that was compared with.
        message: What was seen, and what usually helps.
        step: The optimizer step, of guards over steps.
    """

    guard: str
    level: str
    value: float
    threshold: float
    message: str
    step: int | None = None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def of_answers(counts: Numbers, before: Numbers, guards: GuardsConfig) -> list[Finding]:
    """Guards over the answers of an opponent.

    Args:
        counts: Of its answers to the training prompts (`generation.counts`).
        before: Those of the iteration before; empty where there is none.
        guards: Thresholds.
    """
    get = _reader(counts)
    equal, equal_before = get("equal_share"), _reader(before)("equal_share")
    return _fired(
        _high(
            guards,
            "empty_share",
            get("empty_share"),
            "{:.1%} of the answers are empty: the model ends at once. Look at the prompt template: it has "
            "to be the one that theta_0 was fine-tuned with.",
        ),
        _high(
            guards,
            "repetitive_share",
            get("repetitive_share"),
            "{:.1%} of the answers repeat themselves. The model degenerates: fewer steps or a smaller "
            "spin.lr in the iteration before, or a larger spin.beta; or a lower generation.temperature.",
        ),
        _high(
            guards,
            "duplicate_share",
            get("duplicate_share"),
            "{:.1%} of the answers repeat another sample of the same prompt: lower "
            "generation.num_generations, or raise generation.temperature.",
        ),
        _low(
            guards,
            "distinct_share",
            get("distinct_share"),
            "only {:.1%} of the answers differ from each other: the model says the same whatever it is "
            "asked. Look at the prompt template and at the training before.",
        ),
        _high(
            guards,
            "cut_share",
            get("cut_share"),
            "{:.1%} of the answers are cut by generation.max_tokens: they teach no end. Raise it, or look "
            "whether the model still ends its answers.",
        ),
        _low(
            guards,
            "eos_share",
            get("eos_share"),
            "only {:.1%} of the answers end by themselves. Look whether the demonstrations end with the "
            "token that generation stops at (the tokenizer's EOS, generation.stop_token_ids), and whether "
            "data.max_response_length cuts most of them.",
        ),
        _high(
            guards,
            "length_drift",
            _drift(get("mean_length"), get("real_mean_length")),
            "answers and demonstrations differ in length by a factor of {:.2f}: length alone tells them "
            "apart. Raise generation.max_tokens if answers are cut; spin.length_normalized takes length "
            "out of the margin.",
        ),
        _high(
            guards,
            "equal_share",
            equal,
            "{:.1%} of the answers are the demonstrations, token for token: those pairs teach nothing, and "
            "are dropped. Little is left to learn from these prompts.",
        ),
        _high(
            guards,
            "equal_fall",
            None if equal is None or equal_before is None else equal_before - equal,
            "the share of answers that are the demonstrations fell by {:.3f} since the iteration before: "
            "its training made the model worse. Fewer epochs, a smaller spin.lr, or a larger spin.beta.",
        ),
    )


def of_scores(counts: Numbers, guards: GuardsConfig) -> list[Finding]:
    """Guards over a scoring; the sampler gate (`spin.gates`) is the stricter one."""
    return _fired(
        _high(
            guards,
            "sampler_difference",
            _reader(counts)("sampler_difference"),
            "the sampler's log-probabilities and Megatron's differ by {:.2g} nats per token: compare "
            "generation.dtype with trainer.precision, and the served directory with the trained one.",
        )
    )


def of_training(counts: Numbers, guards: GuardsConfig) -> list[Finding]:
    """Guards over a finished training: its held-out pairs."""
    get = _reader(counts)
    before, after = heldout_real_logps(counts, "opponent"), heldout_real_logps(counts, "policy")
    if get("heldout_loss") is not None and after is not None and not math.isfinite(after):
        return [_not_finite("held-out real log-probability", after, None)]
    return _fired(
        _high(
            guards,
            "heldout_fall",
            None if before is None or after is None else before - after,
            "held-out demonstrations became less likely by {:.3f} nats per token: this iteration is worse "
            "than its opponent. Fewer epochs, a smaller spin.lr, a larger spin.beta, or spin.sft_weight.",
        )
    )


def of_evaluation(now: Numbers, before: Numbers, guards: GuardsConfig) -> list[Finding]:
    """Guards over the scores of two models: "this iteration is not better".

    Args:
        now: Evaluation of theta_{t+1}: `sampled` and `greedy`, each a mapping of numbers.
        before: That of theta_t.
        guards: Thresholds.
    """
    drops = []
    for way in ("sampled", "greedy"):
        scores = [_reader(numbers.get(way) or {})("score") for numbers in (before, now)]
        if scores[0] is not None and scores[1] is not None and scores[0] != 0:
            drops.append((scores[0] - scores[1]) / abs(scores[0]))
    return _fired(
        _high(
            guards,
            "score_drop",
            max(drops, default=None),
            "the score of held-out answers fell by {:.1%} of what it was: this iteration is not better. "
            "More iterations rarely mend it; see which model selfplay.keep kept.",
        )
    )


class StepGuards:
    """Guards over the steps of a training; one that fired fires again only at a higher level.

    Args:
        guards: Thresholds, and over how many of the last steps means are taken.
    """

    def __init__(self, guards: GuardsConfig) -> None:
        self._guards = guards
        self._recent: list[tuple[float, float]] = []  # fall per token and margin
        self._levels: dict[str, str] = {}

    def add(self, line: Numbers) -> list[Finding]:
        """Takes the metrics of a step (a line of metrics.jsonl); returns what is new."""
        step = int(line["step"])
        for name in ("loss", "grad_norm", "policy_real_logps", "policy_generated_logps"):
            value = line.get(name)
            if value is not None and not math.isfinite(value):
                return self._new([_not_finite(name, value, step)])
        if not line.get("real_tokens") or "opponent_real_logps" not in line:
            return []  # plain fine-tuning has no opponent
        fall = (line["opponent_real_logps"] - line["policy_real_logps"]) / line["real_tokens"]
        self._recent = [*self._recent, (fall, line["margin"])][-self._guards.window_steps :]
        if len(self._recent) < self._guards.window_steps:
            return []
        falls, margins = zip(*self._recent, strict=True)
        found = _fired(
            _high(
                self._guards,
                "real_fall",
                sum(falls) / len(falls),
                "demonstrations became less likely than under the opponent, by {:.3f} nats per token: "
                "training destroys what it should teach. A smaller spin.lr, fewer epochs, a larger "
                "spin.beta, spin.dpop_weight or spin.sft_weight.",
                step,
            ),
            _high(
                self._guards,
                "margin_saturated",
                sum(margins) / len(margins),
                "the mean margin is {:.1f}: pairs are told apart and teach no more. Stop the iteration "
                "earlier (spin.max_steps, fewer epochs); a larger spin.beta saturates sooner.",
                step,
            ),
        )
        return self._new(found)

    def _new(self, findings: Iterable[Finding]) -> list[Finding]:
        new = [entry for entry in findings if self._levels.get(entry.guard) not in (STOP, entry.level)]
        self._levels |= {entry.guard: entry.level for entry in new}
        return new


def of_steps(lines: Iterable[Numbers], guards: GuardsConfig) -> list[Finding]:
    """What `StepGuards` says of all steps of a training, in order."""
    watch = StepGuards(guards)
    return [entry for line in lines if line.get("split") == "train" for entry in watch.add(line)]


def heldout_real_logps(counts: Numbers, player: str) -> float | None:
    """Mean log-probability of the held-out demonstrations per token; None where it was not measured.

    Args:
        counts: Of a training.
        player: `policy` or `opponent`.
    """
    get = _reader(counts)
    policy, per_token = get("heldout_policy_real_logps"), get("heldout_policy_real_logps_per_token")
    if player == "policy" or per_token is None:
        return per_token
    opponent = get("heldout_opponent_real_logps")
    return None if opponent is None or not policy else per_token * opponent / policy


def _not_finite(name: str, value: float, step: int | None) -> Finding:
    where = "" if step is None else f" at step {step}"
    return Finding(
        "not_finite",
        STOP,
        value,
        math.inf,
        f"{name} is {value}{where}. A smaller spin.lr, a warm-up (model.optim.sched.warmup_ratio), "
        "model.optim.clip_grad, or trainer.precision=32 to see where it comes from.",
        step,
    )


def _drift(mean: float | None, real: float | None) -> float | None:
    return max(mean / real, real / mean) if mean and real else None


def _reader(numbers: Numbers) -> Callable[[str], float | None]:
    def get(name: str) -> float | None:
        value = numbers.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if is_number and value is not None else None

    return get


def _fired(*findings: Finding | None) -> list[Finding]:
    return [entry for entry in findings if entry is not None]


def _high(
    guards: GuardsConfig, name: str, value: float | None, text: str, step: int | None = None
) -> Finding | None:
    """Fires at values of the threshold and above."""
    return _compared(guards, name, value, text, step, sign=1.0)


def _low(guards: GuardsConfig, name: str, value: float | None, text: str) -> Finding | None:
    """Fires at values of the threshold and below."""
    return _compared(guards, name, value, text, None, sign=-1.0)


def _compared(
    guards: GuardsConfig, name: str, value: float | None, text: str, step: int | None, *, sign: float
) -> Finding | None:
    thresholds: Thresholds = getattr(guards, name)
    if value is None:
        return None
    for level, threshold in ((STOP, thresholds.stop), (WARN, thresholds.warn)):
        if threshold is not None and not sign * value < sign * threshold:
            return Finding(name, level, value, threshold, text.format(value), step)
    return None
