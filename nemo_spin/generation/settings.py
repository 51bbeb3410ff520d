"""How the sampler's engine is set up, from the configuration and the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nemo_spin.config.lora_rules import largest_rank
from nemo_spin.config.schema import Config
from nemo_spin.errors import ConfigError, explain
from nemo_spin.generation.passes import SPLITS, PassPlan
from nemo_spin.generation.prompts import PromptLengths, check_prompts
from nemo_spin.generation.request import EngineSettings
from nemo_spin.megatron.architecture import Architecture


def engine_settings(
    config: Config,
    model_dir: Path,
    adapter_dir: Path | None,
    *,
    architecture: Architecture,
    passes: Sequence[PassPlan],
) -> EngineSettings:
    """The engine for all of `passes`.

    Args:
        config: The configuration.
        model_dir: Hugging Face directory.
        adapter_dir: What makes the model in it the one that answers; None: it is.
        architecture: Of the model.
        passes: What is answered.

    Raises:
        DataError: As `check_pass`.
    """
    generation = config.generation
    size = generation.tensor_parallel_size
    groups = -(-architecture.num_query_groups // size)
    needed = _longest_prompt(passes, architecture) + config.generation.max_tokens
    kv_cache_gib = generation.kv_cache_gib
    return EngineSettings(
        name=generation.engine,
        model_dir=str(model_dir.absolute()),
        dtype=_dtype(config),
        tensor_parallel_size=size,
        max_model_len=min(needed, max_context(architecture)),
        max_num_seqs=generation.max_num_seqs,
        kv_cache_bytes=None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
        kv_numbers_per_token=2 * architecture.num_layers * groups * architecture.head_dim,
        vocab_size=architecture.vocab_size,
        model_sha256=passes[0].model_sha256 if passes else "",
        server=generation.server,
        server_timeout_s=generation.server_timeout_s,
        adapter_dir=None if adapter_dir is None else str(adapter_dir.absolute()),
        max_adapter_rank=largest_rank(config) if generation.adapters else 0,
        adapter_modules=_adapter_modules(config, architecture) if generation.adapters else (),
    )


def _adapter_modules(config: Config, architecture: Architecture) -> tuple[str, ...]:
    from nemo_spin.bridge.peft_files import projection_names

    names = projection_names(architecture, config.model.lora).values()
    return tuple(sorted({name.rsplit(".", 1)[-1] for name in names}))


def check_pass(plan: PassPlan, architecture: Architecture) -> PromptLengths:
    """Compares the prompts of a pass with what the model can take.

    Raises:
        DataError: As `check_prompts`.
    """
    return check_prompts(
        plan.prepared,
        num_prompts=plan.num_prompts,
        vocab_size=architecture.vocab_size,
        max_context=max_context(architecture),
        max_tokens=plan.sampling.max_tokens,
    )


def _longest_prompt(passes: Sequence[PassPlan], architecture: Architecture) -> int:
    """Tokens of the longest prompt of all splits, asked for or not.

    So one engine serves all stages of a run, and has the same settings in all: they decide
    which prompts are computed together, and so the last bits of a number.
    """
    plans = {
        path: replace(plan, prepared=path, num_prompts=None)
        for plan in passes
        for path in (plan.prepared, *(plan.prepared.with_name(f"{split}.parquet") for split in SPLITS))
        if path.exists()
    }
    return max((check_pass(plan, architecture).longest for plan in plans.values()), default=1)


def check_stop_token_ids(config: Config, architecture: Architecture) -> None:
    """Compares `generation.stop_token_ids` with the vocabulary.

    Raises:
        ConfigError: One is outside.
    """
    outside = [
        token for token in config.generation.stop_token_ids if not 0 <= token < architecture.vocab_size
    ]
    if outside:
        raise ConfigError(
            explain(
                "generation.stop_token_ids",
                found=", ".join(map(str, outside)),
                rule=f"the model has a vocabulary of {architecture.vocab_size}: ids are below it",
                remedy="look the ids up in the tokenizer of model.path",
            )
        )


def max_context(architecture: Architecture) -> int:
    """Tokens the model can process; configurations count a linear stretch apart."""
    stretch = architecture.rope.factor if architecture.rope.kind == "linear" else 1.0
    return int(architecture.max_position_embeddings * stretch)


def _dtype(config: Config) -> str:
    """The sampler's number format: as trained, where it is not set."""
    if config.generation.dtype != "auto":
        return config.generation.dtype
    match (str(config.trainer.precision), config.trainer.accelerator):
        case ("bf16", _) | ("auto", "gpu"):
            return "bfloat16"
        case ("32", _) | ("auto", "cpu"):
            return "float32"
        case _:
            return "auto"  # the worker knows its device
