"""The rules of a configuration. All that are broken are reported together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import MISSING

from nemo_spin.config.iterations import with_changes
from nemo_spin.config.mistakes import Mistake, mistake, mistaken_keys, nearest, raise_together, touches
from nemo_spin.config.pipeline_rules import layers_fit
from nemo_spin.config.recompute_rules import recomputation_fits
from nemo_spin.config.relations import RELATIONS
from nemo_spin.config.rules import (
    LISTS,
    NAMES,
    OPTIONAL_PER_ITERATION,
    PER_ITERATION,
    RANGES,
    REQUIRED,
    SAMPLING_PER_ITERATION,
    TEXTS,
    Range,
)
from nemo_spin.config.schema import Config
from nemo_spin.config.typed import leaf_types


def validate(config: Config, *, command: str | None) -> None:
    """Checks every rule that needs the configuration alone.

    Args:
        config: The configuration.
        command: The command that will use it; it decides which keys must be given.
            None: none of them.

    Raises:
        ConfigError: Rules are broken; the message lists all of them.
    """
    raise_together(find_mistakes(config, command=command))


def find_mistakes(config: Config, *, command: str | None) -> list[Mistake]:
    """Every broken rule of `config`; see `validate`."""
    mistakes = [
        *_missing(config, command),
        *_ranges(config),
        *_names(config),
        *_texts(config),
        *_lists(config),
        *_per_iteration(config),
        *_changes(config),
    ]
    mistaken = mistaken_keys(mistakes)
    for relation in RELATIONS:
        if not touches(relation.keys, mistaken):
            mistakes += relation.check(config)
    return mistakes


def check_model_fits(
    config: Config,
    *,
    num_layers: int,
    num_attention_heads: int,
    num_query_groups: int,
    ffn_hidden_size: int,
    vocab_size: int,
    longest_sequence: tuple[int, str] | None = None,
) -> None:
    """Checks that the model can be split as configured.

    The vocabulary is padded to a multiple that the tensor-parallel size divides, so it
    fits unless there are fewer tokens than ranks.

    Args:
        config: The configuration.
        num_layers: Transformer layers.
        num_attention_heads: Heads of the queries.
        num_query_groups: Heads of the keys and values.
        ffn_hidden_size: Width of the gated MLP.
        vocab_size: Tokens, without padding.
        longest_sequence: Tokens beyond which the model cannot be computed, and why; None: no such limit.

    Raises:
        ConfigError: It cannot; the message lists every size that does not divide.
    """
    model = config.model
    splits = [
        (
            "model.tensor_model_parallel_size",
            model.tensor_model_parallel_size,
            num_attention_heads,
            "attention heads",
        ),
        (
            "model.tensor_model_parallel_size",
            model.tensor_model_parallel_size,
            num_query_groups,
            "key/value heads",
        ),
        (
            "model.tensor_model_parallel_size",
            model.tensor_model_parallel_size,
            ffn_hidden_size,
            "MLP columns",
        ),
        (
            "generation.tensor_parallel_size",
            config.generation.tensor_parallel_size,
            num_attention_heads,
            "attention heads",
        ),
    ]
    mistakes = [_does_not_divide(key, size, count, what) for key, size, count, what in splits if count % size]
    mistakes += layers_fit(config, num_layers)
    mistakes += recomputation_fits(config, num_layers)
    sampler_size = config.generation.tensor_parallel_size
    if max(num_query_groups, sampler_size) % min(num_query_groups, sampler_size):
        mistakes.append(
            mistake(
                "generation.tensor_parallel_size",
                found=f"{sampler_size} neither divides the model's {num_query_groups} key/value heads "
                "nor is a multiple of them",
                rule="the sampler splits key/value heads evenly, or copies them evenly",
                remedy=f"set it to {num_query_groups} or 1",
            )
        )
    if vocab_size < model.tensor_model_parallel_size:
        mistakes.append(
            mistake(
                "model.tensor_model_parallel_size",
                found=f"{model.tensor_model_parallel_size}, and the model has a vocabulary of {vocab_size}",
                rule="every tensor-parallel rank holds at least one token of the vocabulary",
                remedy=f"set it to at most {vocab_size}",
            )
        )
    longest = config.data.max_prompt_length + max(
        config.data.max_response_length, config.generation.max_tokens
    )
    if longest_sequence is not None and longest > longest_sequence[0]:
        mistakes.append(
            mistake(
                "data.max_prompt_length",
                found=f"prompt and response may have {longest} tokens",
                rule=f"with this model at most {longest_sequence[0]}: {longest_sequence[1]}",
                remedy="lower data.max_prompt_length, data.max_response_length or generation.max_tokens",
                also=("data.max_response_length", "generation.max_tokens"),
            )
        )
    raise_together(mistakes)


def _does_not_divide(key: str, size: int, count: int, what: str) -> Mistake:
    possible = [str(divisor) for divisor in range(1, min(count, 1024) + 1) if count % divisor == 0][:12]
    return mistake(
        key,
        found=f"{size} does not divide the model's {count} {what}",
        rule=f"the {what} are split evenly",
        remedy=f"set it to one of {', '.join(possible)}",
    )


def _value_at(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _missing(config: Config, command: str | None) -> Iterator[Mistake]:
    if command == "export" and config.export.checkpoint is not None:
        command = "export of a checkpoint"
    for key in REQUIRED[command] if command is not None else ():
        if _value_at(config, key) == MISSING:
            yield mistake(
                key,
                found="is not set",
                rule=f"`nemo-spin {command}` needs it",
                remedy=f"give it in the YAML file, or as {key}=… on the command line",
            )


def _ranges(config: Config) -> Iterator[Mistake]:
    for key, allowed in RANGES.items():
        value = _value_at(config, key)
        if value is not None and not allowed.holds(value):
            yield _out_of_range(key, value, allowed)


def _out_of_range(key: str, value: Any, allowed: Range) -> Mistake:
    return mistake(key, found=value, rule=f"must be {allowed}", remedy=f"change {key}")


def _names(config: Config) -> Iterator[Mistake]:
    for key, known in NAMES.items():
        given = _value_at(config, key)
        values = [] if given is None else given if isinstance(given, list) else [given]
        for value in values:
            if value in known:
                continue
            guess = nearest(value, known)
            yield mistake(
                key,
                found=repr(value),
                rule=f"must be {' or '.join(known)}",
                remedy=f"did you mean `{guess}`?" if guess else f"set {key} to one of these",
            )


def _texts(config: Config) -> Iterator[Mistake]:
    for key in TEXTS:
        value = _value_at(config, key)
        if value is not None and not value.strip():
            yield mistake(
                key, found=repr(value), rule="must not be empty", remedy="give a text, or leave the key out"
            )


def _lists(config: Config) -> Iterator[Mistake]:
    for key, allowed in LISTS.items():
        for value in _value_at(config, key) or ():
            if not allowed.holds(value):
                yield _out_of_range(key, f"{value} in {_value_at(config, key)}", allowed)


def _per_iteration(config: Config) -> Iterator[Mistake]:
    iterations = config.spin.iterations
    for key, allowed in PER_ITERATION.items():
        value = _value_at(config, key)
        wanted = f"{allowed}, or a list with one such value for each iteration"
        optional = key in OPTIONAL_PER_ITERATION
        if not isinstance(value, list):
            if not (allowed.holds(value) or (optional and value is None)):
                yield mistake(key, found=repr(value), rule=f"must be {wanted}", remedy=f"change {key}")
            continue
        for position, entry in enumerate(value):
            if not (allowed.holds(entry) or (optional and entry is None)):
                yield mistake(
                    key,
                    found=f"{entry!r} in iteration {position} of {value}",
                    rule=f"must be {wanted}",
                    remedy="change that value",
                )
        if len(value) != iterations and RANGES["spin.iterations"].holds(iterations):
            yield mistake(
                key,
                found=f"{value} has {len(value)} values, and there are {iterations} iterations",
                rule="must be one value, or a list with one for each iteration",
                remedy=f"give {iterations} values, or set spin.iterations to {max(1, len(value))}",
                also=("spin.iterations",),
            )


def _changes(config: Config) -> Iterator[Mistake]:
    """Of `spin.per_iteration`: which iterations, which keys, and the rules of what they come to."""
    for number, changes in config.spin.per_iteration.items():
        found = _unusable_changes(config, number, changes)
        if found is not None:
            yield mistake(
                "spin.per_iteration",
                found=found,
                rule="the number of an iteration, and a mapping from dotted keys below model.optim or of "
                f"sampling ({', '.join(sorted(SAMPLING_PER_ITERATION))}) to what they are in it",
                remedy="such as {1: {model.optim.weight_decay: 0.1, generation.top_k: 50}}",
                also=("spin.iterations",),
            )
            continue
        changed, mistakes = with_changes(config, changes)
        before = {entry.text for entry in find_mistakes(with_changes(config, {})[0], command=None)}
        for entry in [*mistakes, *find_mistakes(changed, command=None)]:
            if entry.text not in before:
                keys = ("spin.per_iteration", *entry.keys)
                yield Mistake(keys, f"spin.per_iteration, iteration {number}: {entry.text}")


def _unusable_changes(config: Config, number: str, changes: Any) -> str | None:
    if not number.isdecimal() or int(number) >= config.spin.iterations:
        return f"{number!r} is no iteration: there are {config.spin.iterations}, counted from 0"
    if not isinstance(changes, dict):
        return f"{changes!r} at {number}"
    for key in changes:
        if key not in leaf_types() or not (key.startswith("model.optim.") or key in SAMPLING_PER_ITERATION):
            return f"{key!r} at {number}"
    if config.model.optim.carry_over and "model.optim.name" in changes:
        return f"model.optim.name at {number}, and model.optim.carry_over takes over its state"
    return None
