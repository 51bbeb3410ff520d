"""The sampler's process: `python -m nemo_spin.generation.worker REQUEST.json`.

Runs under the interpreter that has vLLM, which may have little else: it imports neither
the configuration nor Megatron or NeMo. It loads the model, answers what the request names
shard by shard, leaves a shard that exists as it is, and waits for the path of another
request, which may name other weights.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path
from typing import TextIO

from nemo_spin.data.progress import Progress, ProgressFile
from nemo_spin.errors import GenerationError, NemoSpinError, explain
from nemo_spin.generation import status
from nemo_spin.generation.engine import Answer, Engine, Prompt
from nemo_spin.generation.host import EngineHost, describe
from nemo_spin.generation.lifeline import die_with_parent
from nemo_spin.generation.request import EngineSettings, GenerationRequest, Pass, ShardPlan, read_request
from nemo_spin.generation.seeds import request_seed
from nemo_spin.generation.shards import PreparedRows, answers_table, write_shard


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
            found=f"the engine failed ({describe(error)})",
            rule="the engine answers every prompt of a shard",
            remedy="the log says more; the same command goes on with a new engine at this shard",
        )
    )


def serve(request: GenerationRequest, host: EngineHost) -> int:
    """Does what a request asks; returns 0, or the exit code of what went wrong."""
    steps = status.StatusWriter(Path(request.status_path))
    try:
        engine = host.open(request, steps)
        run(request, engine=engine, steps=steps, progress=ProgressFile(Path(request.progress_path)))
    except NemoSpinError as error:
        if not isinstance(error, GenerationError):  # of those the traceback is there already
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        steps.error(error)
        return error.exit_code
    steps.step(status.DONE, "waiting for another request")
    return 0


def main(arguments: list[str]) -> int:
    """Serves the request in a file, then those whose paths come in, line by line.

    Ends with the input, and with the first request that fails: an engine is not trusted
    after an error.
    """
    die_with_parent()
    host = EngineHost()
    path: str = arguments[0]
    with _own_input() as paths:
        while path:
            request = read_request(Path(path))
            _log_to(Path(request.log_path))
            code = serve(request, host)
            if code:
                return code
            path = paths.readline().rstrip("\n")
    return 0


def _own_input() -> TextIO:
    """Standard input, kept from whatever the engine starts."""
    mine = os.fdopen(os.dup(0), "r", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return mine


def _log_to(path: Path) -> None:
    """Sends all output of this process to the log of the stage it serves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
