"""How a model answers held-out prompts: sampled and greedy, with the user's scores.

Works like the generate stage and through the same sampler: `start` gives a running
process with one engine for both passes, `finish` scores what it left and writes the
manifest. A scorer sees texts; the token ids stay what they were sampled as. All models
of a run are asked in the same way, that of iteration 0: their scores are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_spin.config.iterations import EVALUATED_AS
from nemo_spin.config.schema import Config
from nemo_spin.data.files import Manifest, atomic_path, write_json, write_manifest
from nemo_spin.data.pairs import read_prepared
from nemo_spin.errors import ConfigError, explain
from nemo_spin.evaluate import benchmarks
from nemo_spin.evaluate.scorer import Scorer, checked_score, load_scorer, scorer_sha256
from nemo_spin.generation import passes, stage
from nemo_spin.generation.counts import count_answers
from nemo_spin.generation.keeper import EngineKeeper
from nemo_spin.generation.placement import Place
from nemo_spin.generation.running import RunningGeneration, wait

RESULTS_NAME = "evaluation.json"
ANSWERS_NAME = "evaluation.parquet"
SAMPLED, GREEDY = "sampled", "greedy"

ANSWERS = pa.schema(
    [
        ("pass", pa.string()),  # sampled | greedy
        ("id", pa.string()),
        ("prompt_text", pa.string()),
        ("real_text", pa.string()),
        ("response_text", pa.string()),  # without the token that ended it
        ("score", pa.float64()),  # null without a scorer
        ("finish_reason", pa.string()),
        ("num_sampler_tokens", pa.int32()),
        ("sampler_logps", pa.float64()),
    ]
)

__all__ = ["evaluate", "finish", "scorer_sha256", "start"]


def start(
    config: Config,
    *,
    model_dir: Path,
    prepared: Path,
    out_dir: Path,
    iteration: int,
    model_sha256: str,
    inputs: Mapping[str, Any],
    progress_path: Path,
    log_path: Path,
    adapter_dir: Path | None = None,
    canary_path: Path | None = None,
    keeper: EngineKeeper | None = None,
    place: Place | None = None,
    check_model: stage.CheckModel | None = None,
) -> RunningGeneration:
    """Starts answering the held-out prompts.

    Args:
        config: The configuration.
        model_dir: Hugging Face directory of the model.
        prepared: Directory with the prepared rows.
        out_dir: Where the answers and results go.
        iteration: Of self-play: for the seeds. How answers are drawn does not depend on it.
        model_sha256: Hash of the model.
        inputs: What the result depends on; must be those of an earlier start.
        progress_path: Where the sampler reports how far it is.
        log_path: Where its output goes.
        adapter_dir: What makes the model in `model_dir` the one that is evaluated; None: it is.
        canary_path: What Megatron says about the model; None: not known.
        keeper: Gives an engine that lives on, and takes it back; None: one for this alone.
        place: Where each of `generation.replicas` samplers runs; None: on this machine.
        check_model: Refuses a directory that no engine may see; None: reads it at every start.

    Raises:
        NemoSpinError: The scorer, the model, the prompts or the directory cannot be used.
    """
    _load_configured_scorer(config)  # a mistake in it shows before anything is answered
    return stage.start(
        config,
        passes=_passes(config, prepared, iteration=iteration, model_sha256=model_sha256),
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
    model_dir: Path,
    prepared: Path,
    out_dir: Path,
    iteration: int,
    model_sha256: str,
    inputs: Mapping[str, Any],
    notes: Mapping[str, Any] | None = None,
) -> Manifest:
    """Scores and counts the answers; writes results, texts and the manifest.

    Args:
        config: As for `start`.
        model_dir: As for `start`; its tokenizer turns answers into texts.
        prepared: As for `start`.
        out_dir: As for `start`.
        iteration: As for `start`.
        model_sha256: As for `start`.
        inputs: As for `start`; the manifest holds them.
        notes: Of the job that `start` gave, for the manifest.

    Returns:
        The manifest; its counts are the results: for each pass the mean score (None
        without a scorer), lengths and shares (`generation.counts`); under `benchmarks`,
        of each task that is configured (`evaluate.benchmarks`, which are done by then).

    Raises:
        DataError: A shard is missing or damaged.
        ConfigError: The scorer fails.
    """
    from nemo_spin.data.templates import load_tokenizer

    scorer = _load_configured_scorer(config)
    tokenizer = load_tokenizer(model_dir)
    results: dict[str, Any] = {}
    answers: list[pa.Table] = []
    files: list[str] = []
    for plan in _passes(config, prepared, iteration=iteration, model_sha256=model_sha256):
        request = passes.request_of(config, plan)
        tables = list(passes.sound_tables(out_dir, request))
        files += [shard.file for shard in request.shards]
        texts = read_prepared(plan.prepared).select(["id", "prompt_text", "real_text"])
        scored = _scored(pa.concat_tables(tables), texts, name=plan.name, tokenizer=tokenizer, scorer=scorer)
        answers.append(scored)
        results[plan.name] = {
            "score": None if scorer is None else _mean(scored["score"].to_pylist()),
            "temperature": plan.sampling.temperature,
            **count_answers(tables),
        }
    if config.evaluation.benchmarks.tasks:
        results["benchmarks"] = benchmarks.results(config, out_dir)
        files += benchmarks.files(config)
    with atomic_path(out_dir / ANSWERS_NAME) as partial:
        table = pa.concat_tables(answers) if answers else ANSWERS.empty_table()
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)
    write_json(out_dir / RESULTS_NAME, results)
    return write_manifest(
        out_dir,
        stage="evaluate",
        files=[*files, ANSWERS_NAME, RESULTS_NAME],
        inputs=inputs,
        counts=results,
        notes=notes,
    )


def evaluate(
    config: Config,
    *,
    model_dir: Path,
    prepared: Path,
    out_dir: Path,
    iteration: int,
    model_sha256: str,
    inputs: Mapping[str, Any],
    progress_path: Path,
    log_path: Path,
) -> Manifest:
    """`start`, wait, `finish`: for callers without a screen. Arguments as theirs.

    Raises:
        NemoSpinError: As `start`, the sampler and `finish`.
    """
    wait(
        start(
            config,
            model_dir=model_dir,
            prepared=prepared,
            out_dir=out_dir,
            iteration=iteration,
            model_sha256=model_sha256,
            inputs=inputs,
            progress_path=progress_path,
            log_path=log_path,
        )
    )
    return finish(
        config,
        model_dir=model_dir,
        prepared=prepared,
        out_dir=out_dir,
        iteration=iteration,
        model_sha256=model_sha256,
        inputs=inputs,
    )


def _passes(config: Config, prepared: Path, *, iteration: int, model_sha256: str) -> list[passes.PassPlan]:
    path = (prepared / "heldout.parquet").absolute()
    if not path.is_file():
        if config.evaluation.benchmarks.tasks:
            return []  # they bring their own questions
        raise ConfigError(
            explain(
                "data.heldout",
                found=f"there is no {path}",
                rule="an evaluation needs held-out demonstrations",
                remedy="set data.heldout and prepare the data again, or set evaluation.enabled=false",
            )
        )
    sampling = passes.configured_sampling(config, prepared, EVALUATED_AS)
    ways = {SAMPLED: sampling, GREEDY: replace(sampling, temperature=0.0, top_p=1.0, top_k=0)}
    wanted = {SAMPLED: config.evaluation.sampled, GREEDY: config.evaluation.greedy}
    return [
        passes.PassPlan(
            name=name,
            prepared=path,
            num_prompts=config.evaluation.num_prompts,
            sampling=way,
            num_generations=1,
            iteration=iteration,
            model_sha256=model_sha256,
        )
        for name, way in ways.items()
        if wanted[name]
    ]


def _load_configured_scorer(config: Config) -> Scorer | None:
    return None if config.evaluation.scorer is None else load_scorer(config.evaluation.scorer)


def _scored(
    answers: pa.Table, texts: pa.Table, *, name: str, tokenizer: Any, scorer: Scorer | None
) -> pa.Table:
    """Joins answers with texts and scores; both tables are in the order of the demonstrations."""
    texts = texts.slice(0, answers.num_rows)
    assert texts["id"].equals(answers["id"]), "checked shards are in the order of the prepared rows"
    responses = _texts(tokenizer, answers["generated_ids"].to_pylist(), answers["finish_reason"].to_pylist())
    prompts, reals = texts["prompt_text"].to_pylist(), texts["real_text"].to_pylist()
    scores: list[float | None] = [None] * len(responses)
    if scorer is not None:
        scores = [
            checked_score(scorer, prompt=prompt, real=real, response=response)
            for prompt, real, response in zip(prompts, reals, responses, strict=True)
        ]
    columns = {
        "pass": pa.array([name] * len(responses), pa.string()),
        "id": answers["id"],
        "prompt_text": texts["prompt_text"],
        "real_text": texts["real_text"],
        "response_text": pa.array(responses, pa.string()),
        "score": pa.array(scores, pa.float64()),
        **{column: answers[column] for column in ("finish_reason", "num_sampler_tokens", "sampler_logps")},
    }
    return pa.table(columns).cast(ANSWERS)


def _texts(tokenizer: Any, answers: Sequence[list[int]], reasons: Sequence[str]) -> list[str]:
    """Answers as texts, without the token that ended them; other special tokens stay visible."""
    bodies = [ids[:-1] if reason == "stop" else ids for ids, reason in zip(answers, reasons, strict=True)]
    texts: list[str] = tokenizer.batch_decode(
        bodies, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return texts


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / max(len(scores), 1)
