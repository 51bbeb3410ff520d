"""export and import-hf: between Megatron checkpoints and Hugging Face directories."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from nemo_spin.bridge.export_hf import export_weights, source_dtype, verify_export
from nemo_spin.bridge.import_hf import load_weights
from nemo_spin.data.files import write_manifest
from nemo_spin.errors import CheckpointError, explain
from nemo_spin.megatron.agreement import from_first_rank
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.megatron.checkpoint import load_checkpoint, save_checkpoint
from nemo_spin.megatron.checkpoint_files import checkpoint_path, latest_checkpoint, recorded_hashes
from nemo_spin.megatron.engine import Engine
from nemo_spin.megatron.runtime import first_rank_writes
from nemo_spin.selfplay.ranks.adapters import merged_engine
from nemo_spin.selfplay.ranks.canary import record_canary, round_to_stored
from nemo_spin.selfplay.ranks.context import StageContext
from nemo_spin.selfplay.ranks.facts import training_facts


def export(context: StageContext) -> None:
    """Writes `model/` from the last checkpoint of `train/`, read back first. All ranks must call.

    Before, `canary.json`: with the model's manifest both are there.

    Raises:
        CheckpointError: There is no checkpoint, or it cannot be read.
        ExportError: The directory could not be written, or differs when read back.
    """
    here = context.here
    checkpoint = from_first_rank(partial(latest_checkpoint, here.train / "checkpoints"))
    if checkpoint is None:
        raise CheckpointError(
            explain(
                str(here.train / "checkpoints"),
                found="holds no complete checkpoint",
                rule="export needs the weights that train has left",
                remedy="run train of this iteration first",
            )
        )
    context.phase("loading the checkpoint")
    if context.config.model.lora.rank is None:
        engine, architecture = context.build_engine(here.opponent)
        load_checkpoint(engine, checkpoint)
    else:
        engine, architecture = merged_engine(context, checkpoint)
    round_to_stored(engine.chunks, source_dtype(here.opponent, architecture))
    record_canary(context, engine)
    context.phase("writing the model")
    export_weights(
        engine.chunks,
        architecture=architecture,
        source_dir=here.opponent,
        out_dir=here.model,
        dtype=None,
        progress=context.progress,
        extra={"inputs": context.inputs, "iteration": context.iteration, **training_facts(context)},
        gate=_gate(context, engine, architecture),
    )


def export_checkpoint(context: StageContext) -> None:
    """Writes `export.output` from `export.checkpoint`. All ranks must call.

    Raises:
        CheckpointError: The checkpoint cannot be read, or is of another model than model.path.
        ExportError: The directory could not be written, or differs when read back.
    """
    source, settings = context.here.opponent, context.config.export
    assert settings.checkpoint is not None, "there is a checkpoint to export"
    engine, architecture = context.build_engine(source)
    checkpoint = Path(settings.checkpoint).expanduser()
    load_checkpoint(engine, from_first_rank(partial(latest_checkpoint, checkpoint)) or checkpoint)
    output = Path(settings.output).expanduser()
    export_weights(
        engine.chunks,
        architecture=architecture,
        source_dir=source,
        out_dir=output,
        progress=context.progress,
        extra={"inputs": context.inputs},
        gate=_gate(context, engine, architecture),
    )


def _gate(context: StageContext, engine: Engine, architecture: Architecture) -> Callable[[Path], None] | None:
    """What an export has to pass before it counts as done; None where `spin.gates.export` is off."""

    def read_back(directory: Path) -> None:
        context.phase("reading it back")
        verify_export(engine.chunks, directory, architecture)

    return read_back if context.config.spin.gates.export else None


def import_hf(context: StageContext) -> None:
    """Writes model.path as a Megatron distributed checkpoint. All ranks must call."""
    source, target = context.here.opponent, context.run.imported_dir
    engine, _ = context.build_engine(
        source, lambda chunks, architecture: load_weights(chunks, source, architecture)
    )
    save_checkpoint(engine, target, step=0, common={}, keep=1)
    with first_rank_writes(context.runtime) as writes:
        if writes:
            files = [str(path.relative_to(target)) for path in target.glob("step-*/*") if path.is_file()]
            hashes = recorded_hashes(checkpoint_path(target, 0), under=target)
            write_manifest(
                target, stage="import-hf", files=files, inputs=context.inputs, counts={}, hashes=hashes
            )
