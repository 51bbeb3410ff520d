"""The sampler's process: `python -m nemo_spin.generation.worker REQUEST.json`.

Runs under the interpreter that has vLLM, which may have little else: it imports neither
the configuration nor Megatron or NeMo. It loads the model once, answers what the request
names shard by shard, and leaves a shard that exists as it is.
"""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path

from nemo_spin.data.progress import Progress, ProgressFile
from nemo_spin.errors import GenerationError, NemoSpinError, explain
from nemo_spin.generation import status
from nemo_spin.generation.engine import Answer, Engine, Prompt
from nemo_spin.generation.lifeline import die_with_parent
from nemo_spin.generation.request import EngineSettings, GenerationRequest, Pass, ShardPlan, read_request
from nemo_spin.generation.seeds import request_seed
from nemo_spin.generation.shards import PreparedRows, answers_table, write_shard


def open_engine(settings: EngineSettings) -> Engine:
    """Loads the model into the engine that the request names.

    Raises:
        GenerationError: It cannot be loaded.
    """
    try:
        match settings.name:
            case "vllm":
                from nemo_spin.generation.vllm_offline import VllmOffline

                return VllmOffline(settings)
            case name:
                raise GenerationError(
                    explain("generation.engine", found=name, rule="vllm", remedy="set it to vllm")
                )
    except NemoSpinError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise GenerationError(
            explain(
                settings.model_dir,
                found=f"could not be loaded into {settings.name} ({_describe(error)})",
                rule="a complete Hugging Face directory of a model that the engine supports",
                remedy="the log says more; see also generation.dtype, generation.kv_cache_gib and "
                "generation.tensor_parallel_size",
            )
        ) from error


class Reporter:
    """Counts answers and tokens, and tells the progress file.

    Args:
        progress: Where it goes.
        total: Answers in all.
        done: Answers that were there already.
    """

    def __init__(self, progress: Progress, *, total: int, done: int) -> None:
        self._progress = progress
        self._total = total
        self._done = done
        self._in_shard = 0
        self._tokens = 0
        self._answers = 0
        self._began = time.monotonic()
        self._values: dict[str, float] = {}
        progress.update(done, total, "answers")

    def answered(self, count: int) -> None:
        """The engine has answered `count` more prompts."""
        self._in_shard += count
        done = min(self._done + self._in_shard, self._total)
        self._progress.update(done, self._total, "answers", **self._values)

    def shard_done(self, answers: list[Answer]) -> None:
        """A shard is written."""
        self._done += len(answers)
        self._in_shard = 0
        self._answers += len(answers)
        self._tokens += sum(len(answer.token_ids) for answer in answers)
        self._values = {
            "tokens_per_s": round(self._tokens / max(time.monotonic() - self._began, 1e-9), 1),
            "mean_length": round(self._tokens / max(self._answers, 1), 1),
        }
        self._progress.update(self._done, self._total, "answers", **self._values)


def run(
    request: GenerationRequest, *, engine: Engine, steps: status.StatusWriter, progress: Progress
) -> None:
    """Answers every shard of every pass that is not there.

    Raises:
        NemoSpinError: The engine or the disk failed.
    """
    out_dir = Path(request.out_dir)
    planned = [(generation, shard) for generation in request.passes for shard in generation.shards]
    missing = [(generation, shard) for generation, shard in planned if not (out_dir / shard.file).exists()]
    reporter = Reporter(progress, total=_answers(planned), done=_answers(planned) - _answers(missing))
    prepared: dict[str, PreparedRows] = {}
    for generation, shard in missing:
        steps.step(status.SHARD, shard.file)
        if generation.prepared not in prepared:
            prepared = {generation.prepared: PreparedRows(Path(generation.prepared))}
        rows = prepared[generation.prepared].read(shard.start, shard.rows)
        prompts = _prompts(rows.select(["id", "prompt_ids"]).to_pylist(), generation, request.engine)
        try:
            answers = engine.answer(prompts, generation.sampling, reporter.answered)
        except NemoSpinError:
            raise
        except Exception as error:
            traceback.print_exc()
            raise _engine_failed(shard, error) from error
        write_shard(out_dir / shard.file, answers_table(rows, answers, generation))
        reporter.shard_done(answers)


def _answers(shards: list[tuple[Pass, ShardPlan]]) -> int:
    return sum(shard.rows * generation.num_generations for generation, shard in shards)


def _prompts(rows: list[dict[str, object]], generation: Pass, engine: EngineSettings) -> list[Prompt]:
    """One request for each sample of each row, the samples of a row side by side."""
    prompts = []
    for row in rows:
        token_ids: list[int] = row["prompt_ids"]  # type: ignore[assignment]  # list<int32>
        room = engine.max_model_len - len(token_ids)
        assert room >= 1, f"a prompt of {len(token_ids)} tokens came through the check of lengths"
        prompts += [
            Prompt(
                token_ids=token_ids,
                seed=request_seed(generation.seed, generation.iteration, str(row["id"]), sample),
                max_tokens=min(generation.sampling.max_tokens, room),
            )
            for sample in range(generation.num_generations)
        ]
    return prompts


def _engine_failed(shard: ShardPlan, error: Exception) -> GenerationError:
    return GenerationError(
        explain(
            shard.file,
            found=f"the engine failed ({_describe(error)})",
            rule="the engine answers every prompt of a shard",
            remedy="the log says more; the same command goes on with a new engine at this shard",
        )
    )


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def main(arguments: list[str]) -> int:
    """Runs one request; returns the exit code."""
    die_with_parent()
    request = read_request(Path(arguments[0]))
    steps = status.StatusWriter(Path(request.status_path))
    try:
        steps.step(status.LOAD, request.engine.model_dir)
        engine = open_engine(request.engine)
        run(request, engine=engine, steps=steps, progress=ProgressFile(Path(request.progress_path)))
    except NemoSpinError as error:
        if not isinstance(error, GenerationError):  # of those the traceback is there already
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        steps.error(error)
        return error.exit_code
    steps.step(status.END, "ending the engine")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
