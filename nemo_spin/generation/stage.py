"""The generate stage as its parent process sees it: check, start the sampler, close with a manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_spin.config.iterations import at_iteration
from nemo_spin.config.lora_rules import largest_rank
from nemo_spin.config.schema import Config
from nemo_spin.data.columns import GENERATED
from nemo_spin.data.files import Manifest, atomic_path, read_manifest, write_manifest
from nemo_spin.data.mixture import chosen
from nemo_spin.data.pairs import read_prepared
from nemo_spin.data.progress import ProgressFile
from nemo_spin.data.row_writer import ROW_GROUP_ROWS
from nemo_spin.errors import ConfigError, DataError, explain
from nemo_spin.generation.counts import count_answers
from nemo_spin.generation.engine import Sampling
from nemo_spin.generation.environment import python_path, sampler_python
from nemo_spin.generation.job import NothingToDo, RunningGeneration, SamplerJob, Timeouts
from nemo_spin.generation.keeper import EngineKeeper
from nemo_spin.generation.process import Interpreter
from nemo_spin.generation.prompts import PromptLengths, check_prompts
from nemo_spin.generation.request import CanaryCheck, EngineSettings, GenerationRequest, Pass
from nemo_spin.generation.resume import keep_sound_shards, write_request
from nemo_spin.generation.shards import PreparedRows, plan_shards, shard_damage
from nemo_spin.megatron.architecture import Architecture

SPLITS = ("train", "heldout")
PROMPTS_NAME = "prompts.parquet"  # of the iteration, where it does not answer all of them


@dataclass(frozen=True)
class PassPlan:
    """One set of prompts and one way to answer them.

    Attributes:
        name: Begins the names of its shards.
        prepared: Parquet file with the prompts.
        num_prompts: Its first rows; None: all.
        sampling: How answers are drawn.
        num_generations: Answers for each prompt.
        iteration: Number of the iteration, also for the seeds.
        model_sha256: Hash of the model that answers.
    """

    name: str
    prepared: Path
    num_prompts: int | None
    sampling: Sampling
    num_generations: int
    iteration: int
    model_sha256: str


def generate(
    config: Config,
    *,
    model_dir: Path,
    prepared: Path,
    out_dir: Path,
    iteration: int,
    opponent_sha256: str,
    inputs: Mapping[str, Any],
    progress_path: Path,
    log_path: Path,
    adapter_dir: Path | None = None,
    canary_path: Path | None = None,
    keeper: EngineKeeper | None = None,
) -> RunningGeneration:
    """Starts answering the prompts of all splits; sound shards of an earlier start are kept.

    Args:
        config: The configuration.
        model_dir: Hugging Face directory of the opponent, or of what its adapter belongs to.
        prepared: Directory with the prepared rows.
        out_dir: Where the shards go.
        iteration: Number of the iteration.
        opponent_sha256: Hash of the opponent.
        inputs: What the result depends on; must be those of an earlier start.
        progress_path: Where the sampler reports how far it is.
        log_path: Where its output goes.
        adapter_dir: What makes the model the opponent; None: it is the opponent itself.
        canary_path: What Megatron says about the opponent (`canary.py`); None: not known.
        keeper: Gives an engine that lives on, and takes it back; None: one for this alone.

    Returns:
        The running process; `finish` is called when its `poll` gives 0.

    Raises:
        NemoSpinError: The model, the prompts or the directory cannot be used; no engine was started.
    """
    if _answers_some(config, iteration):
        _write_prompts(config, prepared / "train.parquet", out_dir / PROMPTS_NAME, iteration)
    passes = _passes(config, prepared, out_dir=out_dir, iteration=iteration, opponent_sha256=opponent_sha256)
    return start(
        config,
        passes=passes,
        model_dir=model_dir,
        out_dir=out_dir,
        inputs=inputs,
        progress_path=progress_path,
        log_path=log_path,
        adapter_dir=adapter_dir,
        canary_path=canary_path,
        keeper=keeper,
    )


def finish(
    config: Config,
    *,
    prepared: Path,
    out_dir: Path,
    iteration: int,
    opponent_sha256: str,
    inputs: Mapping[str, Any],
    notes: Mapping[str, Any] | None = None,
) -> Manifest:
    """Checks all shards, counts, and writes the manifest, which makes the stage done.

    Args:
        config: As for `generate`.
        prepared: As for `generate`.
        out_dir: As for `generate`.
        iteration: As for `generate`.
        opponent_sha256: As for `generate`.
        inputs: As for `generate`; the manifest holds them.
        notes: Of the job that `generate` gave, for the manifest.

    Raises:
        DataError: A shard is missing or damaged.
    """
    passes = _passes(config, prepared, out_dir=out_dir, iteration=iteration, opponent_sha256=opponent_sha256)
    requests = [request_of(config, plan) for plan in passes]
    counts = {request.name: count_answers(sound_tables(out_dir, request)) for request in requests}
    files = [shard.file for request in requests for shard in request.shards]
    if _answers_some(config, iteration):
        files.append(PROMPTS_NAME)
    return write_manifest(out_dir, stage="generate", files=files, inputs=inputs, counts=counts, notes=notes)


def _answers_some(config: Config, iteration: int) -> bool:
    return at_iteration(config.spin.num_prompts, iteration) is not None


def _write_prompts(config: Config, prepared: Path, path: Path, iteration: int) -> None:
    """The prepared rows of `spin.num_prompts` prompts, drawn anew in each iteration."""
    rows = read_prepared(prepared)
    number = at_iteration(config.spin.num_prompts, iteration)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        drawn = chosen(rows.num_rows, number, seed=(config.seed, iteration))
        pq.write_table(rows.take(pa.array(drawn)), partial, row_group_size=ROW_GROUP_ROWS)


def start(
    config: Config,
    *,
    passes: Sequence[PassPlan],
    model_dir: Path,
    out_dir: Path,
    inputs: Mapping[str, Any],
    progress_path: Path,
    log_path: Path,
    adapter_dir: Path | None = None,
    canary_path: Path | None = None,
    keeper: EngineKeeper | None = None,
) -> RunningGeneration:
    """Starts one sampler for all passes, where a shard of them is missing.

    Args:
        config: The configuration.
        passes: What is answered, with one engine.
        model_dir: Hugging Face directory.
        out_dir: Where the shards go.
        inputs: As for `generate`.
        progress_path: As for `generate`.
        log_path: As for `generate`.
        adapter_dir: As for `generate`.
        canary_path: As for `generate`.
        keeper: As for `generate`.

    Raises:
        NemoSpinError: As `generate`.
    """
    from nemo_spin.bridge.families import architecture_of

    architecture = architecture_of(model_dir)
    _check_stop_token_ids(config, architecture)
    progress = ProgressFile(progress_path)
    lengths = [_check_prompts(plan, architecture) for plan in passes]
    if crowded := sum(length.crowded for length in lengths):
        progress.note(f"{crowded} prompts leave less room than generation.max_tokens in the model's context")
    status_path = log_path.with_name(f"{log_path.name}.status")
    request = GenerationRequest(
        engine=_engine_settings(config, model_dir, adapter_dir, architecture=architecture, passes=passes),
        passes=tuple(request_of(config, plan) for plan in passes),
        out_dir=str(out_dir.absolute()),
        progress_path=str(progress_path.absolute()),
        status_path=str(status_path.absolute()),
        log_path=str(log_path.absolute()),
        canary=_canary_check(config, canary_path),
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    request_path = write_request(request, inputs)
    if keep_sound_shards(request, progress) == 0:
        return NothingToDo()
    _check_model(model_dir)
    python = sampler_python(config.generation)
    return SamplerJob(
        request=request,
        request_path=request_path,
        interpreter=Interpreter(python, python_path(python, log_path.parent)),
        timeouts=Timeouts(config.generation.load_timeout_s, config.generation.shard_timeout_s),
        progress=progress,
        keeper=keeper,
        keep=config.generation.keep_engine,
    )


def configured_sampling(config: Config, prepared: Path, iteration: int) -> Sampling:
    """How answers are drawn in `iteration`, as `generation` says.

    Raises:
        DataError: The prepared data does not say at which ids an answer ends.
    """
    manifest = read_manifest(prepared)
    ends = None if manifest is None else manifest.counts.get("stop_token_ids")
    if not ends:
        raise DataError(
            explain(
                str(prepared / "manifest.json"),
                found="is missing" if manifest is None else "names no stop_token_ids",
                rule="prepared data says at which token ids an answer ends",
                remedy="run `nemo-spin prepare` first; if it was, remove the directory and run it again",
            )
        )
    generation = config.generation
    return Sampling(
        temperature=float(at_iteration(generation.temperature, iteration)),
        top_p=float(at_iteration(generation.top_p, iteration)),
        top_k=generation.top_k,
        max_tokens=generation.max_tokens,
        stop_token_ids=tuple(sorted({*ends, *generation.stop_token_ids})),
    )


def sound_tables(out_dir: Path, request: Pass) -> Iterator[pa.Table]:
    """The shards of a pass, in order, each checked before it is given.

    Raises:
        DataError: A shard is missing or damaged.
    """
    prepared = PreparedRows(Path(request.prepared))
    for shard in request.shards:
        path = out_dir / shard.file
        damage = shard_damage(path, shard, request, prepared) if path.exists() else "is missing"
        if damage is not None:
            raise DataError(
                explain(
                    str(path),
                    found=damage,
                    rule="every shard holds the answers to its prompts",
                    remedy="start the same command again: the shard is made again",
                )
            )
        yield pq.read_table(path, schema=GENERATED, partitioning=None)


def _passes(
    config: Config, prepared: Path, *, out_dir: Path, iteration: int, opponent_sha256: str
) -> list[PassPlan]:
    sampling = configured_sampling(config, prepared, iteration)
    files = {split: prepared / f"{split}.parquet" for split in SPLITS}
    if _answers_some(config, iteration):
        files["train"] = out_dir / PROMPTS_NAME
    return [
        PassPlan(
            name=split,
            prepared=path.absolute(),
            num_prompts=None,
            sampling=sampling,
            num_generations=config.generation.num_generations,
            iteration=iteration,
            model_sha256=opponent_sha256,
        )
        for split, path in files.items()
        if path.exists()
    ]


def request_of(config: Config, plan: PassPlan) -> Pass:
    """A pass as the sampler gets it: with its shards and the configured seed."""
    rows = PreparedRows(plan.prepared).num_rows
    return Pass(
        name=plan.name,
        prepared=str(plan.prepared),
        sampling=plan.sampling,
        num_generations=plan.num_generations,
        seed=config.seed,
        iteration=plan.iteration,
        opponent_sha256=plan.model_sha256,
        shards=plan_shards(plan.name, min(rows, plan.num_prompts or rows), config.generation.shard_rows),
    )


def _engine_settings(
    config: Config,
    model_dir: Path,
    adapter_dir: Path | None,
    *,
    architecture: Architecture,
    passes: Sequence[PassPlan],
) -> EngineSettings:
    generation = config.generation
    if generation.replicas != 1:
        raise ConfigError(
            explain(
                "generation.replicas",
                found=generation.replicas,
                rule="one sampler at a time is what this version starts",
                remedy="set it to 1; generation.tensor_parallel_size uses several devices",
            )
        )
    size = generation.tensor_parallel_size
    groups = -(-architecture.num_query_groups // size)
    needed = _longest_prompt(passes, architecture) + config.generation.max_tokens
    kv_cache_gib = generation.kv_cache_gib
    return EngineSettings(
        name=generation.engine,
        model_dir=str(model_dir.absolute()),
        dtype=_dtype(config),
        tensor_parallel_size=size,
        max_model_len=min(needed, _max_context(architecture)),
        max_num_seqs=generation.max_num_seqs,
        kv_cache_bytes=None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
        kv_numbers_per_token=2 * architecture.num_layers * groups * architecture.head_dim,
        vocab_size=architecture.vocab_size,
        model_sha256=passes[0].model_sha256 if passes else "",
        server=generation.server,
        adapter_dir=None if adapter_dir is None else str(adapter_dir.absolute()),
        max_adapter_rank=largest_rank(config) if generation.adapters else 0,
        adapter_modules=_adapter_modules(config, architecture) if generation.adapters else (),
    )


def _adapter_modules(config: Config, architecture: Architecture) -> tuple[str, ...]:
    from nemo_spin.bridge.peft_files import projection_names

    names = projection_names(architecture, config.model.lora).values()
    return tuple(sorted({name.rsplit(".", 1)[-1] for name in names}))


def _canary_check(config: Config, path: Path | None) -> CanaryCheck | None:
    gates = config.spin.gates
    if path is None or not path.exists() or not gates.sampler:
        return None
    return CanaryCheck(str(path.absolute()), gates.sampler_tolerance)


def _check_prompts(plan: PassPlan, architecture: Architecture) -> PromptLengths:
    return check_prompts(
        plan.prepared,
        num_prompts=plan.num_prompts,
        vocab_size=architecture.vocab_size,
        max_context=_max_context(architecture),
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
    return max((_check_prompts(plan, architecture).longest for plan in plans.values()), default=1)


def _check_stop_token_ids(config: Config, architecture: Architecture) -> None:
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


def _max_context(architecture: Architecture) -> int:
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


def _check_model(model_dir: Path) -> None:
    """vLLM answers garbage where a tensor is missing or not finite: it never sees such a directory."""
    from nemo_spin.bridge.checkpoint_files import check_checkpoint

    check_checkpoint(model_dir)
