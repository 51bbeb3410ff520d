"""What is asked: a configuration, what the command line adds to it, and what that means in numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from nemo_spin.config.iterations import at_iteration
from nemo_spin.config.lora_rules import targets_of
from nemo_spin.config.mistakes import nearest, raise_together
from nemo_spin.config.rules import RANGES
from nemo_spin.config.schema import Config, ModelConfig, SpinConfig
from nemo_spin.config.validate import find_mistakes
from nemo_spin.errors import ConfigError, explain
from nemo_spin.megatron.sizes import DEVICES, Cluster, Device, Numerics, Work

# What a plan chooses, unless the command line gives it: section -> keys, with their neutral values.
CHOSEN: dict[str, dict[str, Any]] = {
    "model": {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "sequence_parallel": False,
        "recompute_granularity": None,
        "use_distributed_optimizer": None,
    },
    "generation": {"tensor_parallel_size": 1, "replicas": 1},
    "trainer": {"devices": 1, "num_nodes": 1},
}
# What a plan takes as it is, but that is right or wrong only beside what it chooses.
_DEPENDENT: dict[str, Any] = {
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "recompute_modules": ModelConfig().recompute_modules,
    "recompute_method": ModelConfig().recompute_method,
    "recompute_num_layers": ModelConfig().recompute_num_layers,
    "overlap_param_gather": False,
}
_RATES = [field.name for field in fields(Device) if field.name != "name"]
_OVERRIDE = re.compile(r"\+?([\w.]+)=")


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of prompts, real and generated responses; None: a share of the configured limit."""

    prompt: float | None = None
    real: float | None = None
    generated: float | None = None


@dataclass(frozen=True)
class Request:
    """Everything that a plan depends on besides the model.

    Attributes:
        config: The configuration; its parallel sizes are what is compared with.
        pinned: Dotted keys that the command line gave: they are not chosen.
        cluster: GPUs.
        numerics: Precision and optimizer.
        work: Units of self-play.
        pairs: Prompts times generations of one iteration.
        epochs: Over the pairs, of the longest iteration.
        max_steps: Optimizer steps an iteration stops after; None: one of them goes through its epochs.
        max_tokens: Of a prompt and its answer, at most.
    """

    config: Config
    pinned: frozenset[str]
    cluster: Cluster
    numerics: Numerics
    work: Work
    pairs: int
    epochs: int
    max_steps: int | None
    max_tokens: int


def make_request(
    config: Config, overrides: Sequence[str], *, cluster: Cluster, pairs: int, lengths: Lengths
) -> Request:
    """Checks what was given.

    Raises:
        ConfigError: A value breaks a rule; those about parallel sizes and nodes are the plan's business.
    """
    _check(config)
    pinned = frozenset(match[1] for text in overrides if (match := _OVERRIDE.match(text)))
    data, generation, model = config.data, config.generation, config.model
    prompt = _mean("--prompt-tokens", lengths.prompt, data.max_prompt_length, share=4)
    real = _mean("--real-tokens", lengths.real, data.max_response_length, share=4)
    generated = _mean("--generated-tokens", lengths.generated, generation.max_tokens, share=2)
    number = generation.num_generations
    prompts = 1 + number if model.packing == "pairs" else 1
    longest = prompts * data.max_prompt_length + data.max_response_length + number * generation.max_tokens
    work = Work(
        prompt=prompt,
        real=real,
        generated=generated,
        longest_unit=longest,
        micro_batch_tokens=model.micro_batch_tokens,
        num_generations=number,
        packing=model.packing,
        padded_row=data.max_prompt_length + max(data.max_response_length, generation.max_tokens),
        micro_batch_size=model.micro_batch_size,
        global_batch_size=model.global_batch_size,
    )
    return Request(
        config=config,
        pinned=pinned,
        cluster=cluster,
        numerics=Numerics(
            bytes_per_number=4 if config.trainer.precision == "32" else 2,
            optimizer=model.optim.name,
            offloaded=model.optimizer_offload_fraction if model.optimizer_cpu_offload else 0.0,
            lora_rank=model.lora.rank,
            lora_targets=targets_of(model.lora, gated=True),  # a gate that is not there counts nothing
        ),
        work=work,
        pairs=pairs,
        epochs=max(int(at_iteration(config.spin.epochs, i)) for i in range(config.spin.iterations)),
        max_steps=_max_steps(config.spin),
        max_tokens=data.max_prompt_length + generation.max_tokens,
    )


def _max_steps(spin: SpinConfig) -> int | None:
    steps = [at_iteration(spin.max_steps, i) for i in range(spin.iterations)]
    return None if None in steps else max(steps)


def _check(config: Config) -> None:
    """Rules that hold whatever the plan chooses; of the chosen keys, their own range only."""
    neutral = replace(
        config,
        **{section: replace(getattr(config, section), **values) for section, values in CHOSEN.items()},
    )
    neutral = replace(neutral, model=replace(neutral.model, **_DEPENDENT))
    mistakes = find_mistakes(neutral, command=None)
    raise_together(mistakes)
    for section, values in CHOSEN.items():
        for name in values:
            key, value = f"{section}.{name}", getattr(getattr(config, section), name)
            if value is not None and key in RANGES and not RANGES[key].holds(value):
                raise ConfigError(
                    explain(key, found=value, rule=f"must be {RANGES[key]}", remedy=f"change {key}")
                )


def _mean(option: str, given: float | None, limit: int, *, share: int) -> float:
    value = max(1.0, limit / share) if given is None else given
    if 1 <= value <= limit:
        return float(value)
    raise ConfigError(
        explain(
            option,
            found=value,
            rule=f"a mean number of tokens from 1 to the configured limit, {limit}",
            remedy="lower it, or raise the limit (data.max_prompt_length, data.max_response_length, "
            "generation.max_tokens)",
        )
    )


def count(option: str, value: int, *, most: int) -> int:
    """A number of things from the command line.

    Raises:
        ConfigError: It is not positive, or absurd.
    """
    if 1 <= value <= most:
        return value
    rule = f"a whole number from 1 to {most:,}"
    raise ConfigError(explain(option, found=value, rule=rule, remedy=f"change {option}"))


def read_device(text: str) -> Device:
    """A kind of GPU (`H100`), its name with other numbers (`H100,memory_gib=94`), or all numbers.

    Raises:
        ConfigError: The kind or a number is not known.
    """
    parts = [part.strip() for part in text.split(",")]
    kind = parts.pop(0) if parts and "=" not in parts[0] else None
    known = {name.lower(): device for name, device in DEVICES.items()}
    if kind is not None and kind.lower() not in known:
        guess = nearest(kind, DEVICES, cutoff=0.3)
        raise _unknown_gpu(text, f"{kind!r} is not in the table", f"did you mean {guess}?" if guess else None)
    values: dict[str, float] = {}
    for part in parts:
        name, _, number = part.partition("=")
        if name not in _RATES:
            raise _unknown_gpu(text, f"{name!r} is no property of a GPU")
        values[name] = _positive(text, number)
    if kind is not None:
        device = known[kind.lower()]
        return Device(device.name, **{name: values.get(name, getattr(device, name)) for name in _RATES})
    missing = [name for name in _RATES if name not in values]
    if missing:
        raise _unknown_gpu(text, f"has no {', '.join(missing)}")
    return Device(name="given", **values)


def _positive(text: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise _unknown_gpu(text, f"{number!r} is not a positive number")
    return value


def _unknown_gpu(text: str, found: str, remedy: str | None = None) -> ConfigError:
    rule = f"one of {', '.join(DEVICES)}, or numbers: {','.join(f'{name}=…' for name in _RATES)}"
    return ConfigError(explain(f"--gpu {text}", found=found, rule=rule, remedy=remedy or "choose one"))
