"""The sampler's process: `python -m nemo_spin.generation.worker REQUEST.json`.

Runs under the interpreter that has vLLM, which may have little else: it imports neither
the configuration nor Megatron or NeMo. It loads the model, answers what the request names
shard by shard, leaves a shard that exists as it is, and waits for the path of another
request, which may name other weights.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TextIO

from nemo_spin.data.progress import Progress, ProgressFile
from nemo_spin.errors import GenerationError, NemoSpinError, explain
from nemo_spin.generation import status
from nemo_spin.generation.engine import Engine, Prompt
from nemo_spin.generation.host import EngineHost, describe
from nemo_spin.generation.lifeline import die_with_parent
from nemo_spin.generation.reporter import Reporter, ShareReporter
from nemo_spin.generation.request import EngineSettings, GenerationRequest, Pass, ShardPlan, read_request
from nemo_spin.generation.seeds import request_seed
from nemo_spin.generation.shards import PreparedRows, answers_table, write_shard
from nemo_spin.generation.turns import missing, num_answers, turns


def run(
    request: GenerationRequest, *, engine: Engine, steps: status.StatusWriter, progress: Progress
) -> None:
    """Answers every shard of every pass that is not there and that no other process answers.

    Raises:
        NemoSpinError: The engine or the disk failed.
    """
    out_dir = Path(request.out_dir)
    reporter: Reporter | ShareReporter
    if request.leases is None:
        planned = [(generation, shard) for generation in request.passes for shard in generation.shards]
        done = num_answers(planned) - num_answers(missing(request))
        reporter = Reporter(progress, total=num_answers(planned), done=done)
    else:
        reporter = ShareReporter(steps)
    prepared: dict[str, PreparedRows] = {}
    for generation, shard in turns(request, steps):
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
