"""The generate stage as its parent process sees it: check, start the sampler, close with a manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nemo_spin.config.schema import Config
from nemo_spin.data.files import Manifest, write_json, write_manifest
from nemo_spin.data.progress import Progress, ProgressFile
from nemo_spin.generation.counts import count_answers
from nemo_spin.generation.environment import python_path, sampler_python
from nemo_spin.generation.job import NothingToDo, SamplerJob, Timeouts
from nemo_spin.generation.keeper import EngineKeeper
from nemo_spin.generation.leases import LeaseSettings
from nemo_spin.generation.passes import (
    PROMPTS_NAME,
    PassPlan,
    answers_some,
    request_of,
    sound_tables,
    split_passes,
    write_prompts,
)
from nemo_spin.generation.placement import Place, on_this_machine
from nemo_spin.generation.process import Interpreter
from nemo_spin.generation.prompts import longest_first
from nemo_spin.generation.replicas import ReplicasJob, owner_of
from nemo_spin.generation.request import CanaryCheck, GenerationRequest
from nemo_spin.generation.resume import keep_sound_shards, write_request
from nemo_spin.generation.running import RunningGeneration
from nemo_spin.generation.settings import check_pass, check_stop_token_ids, engine_settings

LEASES_NAME = "leases"  # which of several samplers is at which shard
CheckModel = Callable[[Path], object]


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
    place: Place | None = None,
    check_model: CheckModel | None = None,
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
        place: Where each of `generation.replicas` samplers runs; None: on this machine.
        check_model: Refuses a directory that no engine may see; None: `check_checkpoint`, which reads
            all weights at every start.

    Returns:
        The running process; `finish` is called when its `poll` gives 0.

    Raises:
        NemoSpinError: The model, the prompts or the directory cannot be used; no engine was started.
    """
    if answers_some(config, iteration):
        write_prompts(config, prepared / "train.parquet", out_dir / PROMPTS_NAME, iteration)
    passes = split_passes(
        config, prepared, out_dir=out_dir, iteration=iteration, opponent_sha256=opponent_sha256
    )
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
        place=place,
        check_model=check_model,
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
    passes = split_passes(
        config, prepared, out_dir=out_dir, iteration=iteration, opponent_sha256=opponent_sha256
    )
    requests = [request_of(config, plan) for plan in passes]
    counts = {request.name: count_answers(sound_tables(out_dir, request)) for request in requests}
    files = [shard.file for request in requests for shard in request.shards]
    if answers_some(config, iteration):
        files.append(PROMPTS_NAME)
    return write_manifest(out_dir, stage="generate", files=files, inputs=inputs, counts=counts, notes=notes)


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
    place: Place | None = None,
    check_model: CheckModel | None = None,
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
        place: As for `generate`.
        check_model: As for `generate`.

    Raises:
        NemoSpinError: As `generate`.
    """
    from nemo_spin.bridge.families import architecture_of

    generation = config.generation
    architecture = architecture_of(model_dir)
    check_stop_token_ids(config, architecture)
    place = place or on_this_machine(
        replicas=generation.replicas, tensor_parallel_size=generation.tensor_parallel_size
    )
    progress = ProgressFile(progress_path)
    lengths = [check_pass(plan, architecture) for plan in passes]
    if crowded := sum(length.crowded for length in lengths):
        progress.note(f"{crowded} prompts leave less room than generation.max_tokens in the model's context")
    engine = engine_settings(config, model_dir, adapter_dir, architecture=architecture, passes=passes)
    request = GenerationRequest(
        engine=replace(engine, neighbours=place(0).neighbours),
        passes=tuple(request_of(config, plan) for plan in passes),
        out_dir=str(out_dir.absolute()),
        progress_path=str(progress_path.absolute()),
        status_path=f"{log_path.absolute()}.status",
        log_path=str(log_path.absolute()),
        canary=_canary_check(config, canary_path),
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    request_path = write_request(request, inputs)
    missing = keep_sound_shards(request, progress)
    if missing == 0:
        return NothingToDo()
    (check_model or _check_model)(model_dir)
    python = sampler_python(config)
    start_job = partial(
        SamplerJob,
        interpreter=Interpreter(python, python_path(python, log_path.parent)),
        timeouts=Timeouts(generation.load_timeout_s, generation.shard_timeout_s),
        progress=progress,
        keeper=keeper,
        keep=generation.keep_engine,
    )
    if generation.replicas == 1:
        return start_job(request=request, request_path=request_path, placement=place(0))
    return _start_several(
        config, request, num_shards=missing, start=start_job, place=place, progress=progress
    )


def _start_several(
    config: Config,
    request: GenerationRequest,
    *,
    num_shards: int,
    start: Callable[..., SamplerJob],
    place: Place,
    progress: Progress,
) -> ReplicasJob:
    """Starts `generation.replicas` samplers, of which none is there for nothing."""
    leases_dir = Path(request.out_dir) / LEASES_NAME
    silent_s = config.generation.lease_timeout_s
    shared = replace(
        request,
        order=longest_first(request.passes),
        leases=LeaseSettings(str(leases_dir), owner="", silent_s=silent_s),
    )

    def start_one(index: int, number: int) -> SamplerJob:
        log_path = Path(request.log_path)
        stem = str(log_path.with_name(f"{log_path.stem}.sampler-{index:03d}"))
        mine = replace(
            shared,
            log_path=f"{stem}.log",
            status_path=f"{stem}.status",
            leases=LeaseSettings(str(leases_dir), owner_of(index, number), silent_s),
        )
        path = Path(f"{stem}.request.json")
        write_json(path, {"request": mine.to_dict()})
        return start(request=mine, request_path=path, slot=index, placement=place(index))

    return ReplicasJob(
        request=shared,
        replicas=min(config.generation.replicas, num_shards),
        start=start_one,
        attempts=config.generation.replica_attempts,
        progress=progress,
    )


def _canary_check(config: Config, path: Path | None) -> CanaryCheck | None:
    gates = config.spin.gates
    if path is None or not path.exists() or not gates.sampler:
        return None
    return CanaryCheck(str(path.absolute()), gates.sampler_tolerance)


def _check_model(model_dir: Path) -> None:
    """vLLM answers garbage where a tensor is missing or not finite: it never sees such a directory."""
    from nemo_spin.bridge.checkpoint_files import check_checkpoint

    check_checkpoint(model_dir)
