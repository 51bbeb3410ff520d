"""Entry point of a stage's ranks: `python -m nemo_spin.selfplay.worker STAGE --run-dir DIR …`.

It imports Megatron only once it knows the stage, reports a user's mistake to the command
that started it as a typed event, and leaves everything else to the traceback in its log.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path

from nemo_spin.data.progress import Progress, ProgressFile, SilentProgress
from nemo_spin.errors import NemoSpinError
from nemo_spin.selfplay.heartbeat import Heartbeat, heartbeat_path

_STARTED = time.monotonic()  # before Megatron and NeMo are imported, which is reported as well

PROGRESS_VARIABLE = "NEMO_SPIN_PROGRESS"

STAGES = {
    "score": "nemo_spin.selfplay.ranks.score:score",
    "train": "nemo_spin.selfplay.ranks.train:train",
    "sft": "nemo_spin.selfplay.ranks.train:sft",
    "export": "nemo_spin.selfplay.ranks.export:export",
    "import-hf": "nemo_spin.selfplay.ranks.export:import_hf",
    "export-checkpoint": "nemo_spin.selfplay.ranks.export:export_checkpoint",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one rank of one stage; returns its exit code."""
    parser = argparse.ArgumentParser(prog="nemo_spin.selfplay.worker")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--iteration", type=int)
    parser.add_argument("--inputs", type=Path, required=True, help="JSON the stage's manifest will hold")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    rank = int(os.environ.get("RANK", "0"))
    path = os.environ.get(PROGRESS_VARIABLE)
    file = ProgressFile(Path(path)) if path else None
    heartbeat = Heartbeat(heartbeat_path(Path(path), rank)) if path else None
    try:
        _run(options, file if file and rank == 0 else SilentProgress(), heartbeat)
    except NemoSpinError as error:
        if file is None:
            raise
        file.error(error)
        return error.exit_code
    return 0


def _run(options: argparse.Namespace, progress: Progress, heartbeat: Heartbeat | None) -> None:
    from nemo_spin.config.iterations import config_at
    from nemo_spin.config.load import read_yaml
    from nemo_spin.megatron.phases import is_of_a_collective
    from nemo_spin.megatron.runtime import choose_accelerator, finalize, initialize
    from nemo_spin.selfplay.ranks.context import StageContext
    from nemo_spin.selfplay.run_directory import RunDirectory

    run = RunDirectory(options.run_dir)
    config = config_at(read_yaml(run.config_path), options.iteration)
    if heartbeat is not None:
        heartbeat.watched(config.launcher.hang_timeout_s)
        heartbeat.phase("joining the process groups")
    choose_accelerator(config.trainer.accelerator)
    runtime = initialize(
        tensor_model_parallel_size=config.model.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.model.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.model.context_parallel_size,
        expert_model_parallel_size=config.model.expert_model_parallel_size,
        seed=config.seed,
        timeout_s=config.launcher.collective_timeout_s,
    )
    context = StageContext(
        config=config,
        run=run,
        iteration=options.iteration,
        runtime=runtime,
        progress=progress,
        inputs=json.loads(options.inputs.read_text(encoding="utf-8")),
        started=_STARTED,
        heartbeat=heartbeat,
    )
    module, _, function = STAGES[options.stage].partition(":")
    try:
        getattr(importlib.import_module(module), function)(context)
    except RuntimeError as error:
        if runtime.phases is None or not is_of_a_collective(error):
            raise
        traceback.print_exc()
        raise runtime.phases.broke_off(error) from error
    finalize()


if __name__ == "__main__":
    sys.exit(main())
