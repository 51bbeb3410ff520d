"""What a stage's result depends on, and how to say that it differs.

The `inputs` of a manifest are a mapping: hashes of what the stage consumed, and under
`config` the values of exactly those configuration keys that matter to its result. Each
stage declares its keys in `KEYS` below. Keys that are in no list change no result
(beyond the order in which numbers are rounded): where and with how many processes
something runs, how it is cut into batches or shards, logging, time-outs, names.
"""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_spin.config.iterations import at_iteration, config_at
from nemo_spin.config.schema import Config
from nemo_spin.errors import ConfigError, explain

_SAMPLING = (
    "seed",
    "generation.engine",
    "generation.temperature",
    "generation.top_p",
    "generation.top_k",
    "generation.max_tokens",
    "generation.stop_token_ids",
    "generation.dtype",
    "generation.adapters",
    "trainer.precision",
)
_PRECISION = ("trainer.precision", "model.fp8", "model.fp8_recipe")
_OPTIMIZATION = (
    "seed",
    "model.global_batch_size",
    "model.optim",
    "model.lora.rank",
    "model.lora.alpha",
    "model.lora.dropout",
    "model.lora.target_modules",
    *_PRECISION,
)
_OBJECTIVE = (
    "spin.loss",
    "spin.beta",
    "spin.length_normalized",
    "spin.label_smoothing",
    "spin.sft_weight",
    "spin.dpop_weight",
    "spin.opponent_mix",
)

# `prepare` lists its inputs itself (`data/inputs.py`).
KEYS: dict[str, tuple[str, ...]] = {
    "generate": (*_SAMPLING, "generation.num_generations", "spin.num_prompts"),
    "score": (*_PRECISION, "spin.history", "spin.mixture"),
    "train": (*_OPTIMIZATION, *_OBJECTIVE, "spin.lr", "spin.epochs", "spin.max_steps"),
    "export": ("trainer.precision", "model.lora.export_adapter"),
    "evaluate": (
        *_SAMPLING,
        "evaluation.scorer",
        "evaluation.num_prompts",
        "evaluation.sampled",
        "evaluation.greedy",
        "evaluation.benchmarks.tasks",
        "evaluation.benchmarks.limit",
        "evaluation.benchmarks.max_length",
    ),
    "sft": (*_OPTIMIZATION, "sft.lr", "sft.epochs", "sft.max_steps"),
    "import-hf": ("trainer.precision",),
    "export-checkpoint": ("trainer.precision",),
}
PER_ITERATION = frozenset(
    {
        "spin.beta",
        "spin.lr",
        "spin.epochs",
        "spin.max_steps",
        "spin.num_prompts",
        "generation.temperature",
        "generation.top_p",
    }
)


def config_inputs(config: Config, stage: str, iteration: int | None) -> dict[str, Any]:
    """Dotted key -> value of what matters to `stage`, as it is in this iteration."""
    config = config_at(config, iteration)
    values: dict[str, Any] = {}
    for key in KEYS[stage]:
        value = config_value(config, key)
        if key in PER_ITERATION:
            value = at_iteration(value, 0 if iteration is None else iteration)
        values.update(flatten(value, key))
    return dict(plain(values))


def config_value(config: Config, key: str) -> Any:
    """The value of a dotted key; sections as nested mappings."""
    node: Any = asdict(config)
    for name in key.split("."):
        node = node[name]
    return node


def flatten(value: Any, key: str) -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    if not isinstance(value, Mapping):
        return {key: value}
    leaves: dict[str, Any] = {}
    for part, below in value.items():
        leaves |= flatten(below, f"{key}.{part}")
    return leaves


def plain(value: Any) -> Any:
    """`value` as JSON gives it back, so that it can be compared with what was written."""
    return json.loads(json.dumps(value))


@dataclass(frozen=True)
class Difference:
    """One input of a stage that is not what it was.

    Attributes:
        stage: Such as "train of iteration 0".
        key: A configuration key, or what else the stage consumed.
        was: The value then; `ABSENT` if there was none.
        now: The value today; `ABSENT` if there is none.
    """

    stage: str
    key: str
    was: Any
    now: Any

    @property
    def words(self) -> str:
        """Such as "spin.beta: was 0.1, is 1.0"."""
        return f"{self.key}: was {_shown(self.was)}, is {_shown(self.now)}"


ABSENT = object()


def differences(
    stage: str, was: Mapping[str, Any], now: Mapping[str, Any], *, prefix: str = ""
) -> list[Difference]:
    """Every input of `now` that is not as in `was`, configuration keys first.

    A key that a newer version knows and that has its default is no difference.

    Args:
        stage: Whose inputs they are, for the message.
        was: The inputs then.
        now: The inputs today.
        prefix: What the keys under `config` lack of their full names.
    """
    before, today = plain(was), plain(now)
    keys = _compare(
        stage, _leaves(before.pop("config", {}), prefix), _leaves(today.pop("config", {}), prefix)
    )
    found = [
        *(difference for difference in keys if not _is_new_default(difference)),
        *_compare(stage, _leaves(before), _leaves(today)),
    ]
    return [difference for difference in found if difference.was != difference.now]


def _is_new_default(difference: Difference) -> bool:
    """Whether the key is younger than the result, and its default stands for what was done then."""
    return difference.was is ABSENT and _defaults().get(difference.key, ABSENT) == difference.now


@functools.cache
def _defaults() -> dict[str, Any]:
    return _leaves(plain(asdict(Config())))


def config_differences(was: Config, now: Config) -> list[str]:
    """Every configuration key whose value changed, in words."""
    found = _compare("", _leaves(plain(asdict(was))), _leaves(plain(asdict(now))))
    return [difference.words for difference in found if difference.was != difference.now]


def _compare(stage: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    keys = [*now, *(key for key in was if key not in now)]
    return [Difference(stage, key, was.get(key, ABSENT), now.get(key, ABSENT)) for key in keys]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        leaves |= flatten(value, prefix + key)
    return leaves


def refuse(run_dir: Path, found: list[Difference], redo: list[Path]) -> ConfigError:
    """The error for a run directory whose finished work does not fit today's inputs.

    Args:
        run_dir: The run directory.
        found: What differs.
        redo: Directories that would have to be made again.
    """
    where = shlex.join(str(path) for path in redo)
    lines = "".join(f"\n    {line.words}  ({line.stage})" for line in found)
    return ConfigError(
        explain(
            str(run_dir),
            found=f"was made from other inputs{lines}",
            rule="finished work is used again only if all it was made from is the same",
            remedy=f"set them back, give another run_dir, or redo the work from there on: rm -r {where}",
        )
    )


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "not there"
    if isinstance(value, str) and len(value) == 64 and all(digit in "0123456789abcdef" for digit in value):
        return f"{value[:12]}…"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"
