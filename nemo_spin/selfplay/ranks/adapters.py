"""export, where adapters were trained: the opponent and what they learned, as one model."""

from __future__ import annotations

from pathlib import Path

from nemo_spin.bridge.export_peft import export_adapter
from nemo_spin.bridge.import_hf import load_weights
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.megatron.checkpoint import load_checkpoint
from nemo_spin.megatron.engine import Engine
from nemo_spin.megatron.lora import attach, merge
from nemo_spin.selfplay.ranks.context import StageContext

_MUCH_ROUNDING = 0.1  # share of the adapters' update that is worth a note


def merged_engine(context: StageContext, checkpoint: Path) -> tuple[Engine, Architecture]:
    """theta_{t+1}: the opponent's weights and alpha / r B A, rounded once. All ranks must call.

    Where `model.lora.export_adapter` asks for it, `adapter/` is written first: what was learned
    since theta_0, in this iteration and those before. The next iteration starts from the merged
    weights with new adapters: its policy at B = 0 and its opponent are one model to the last bit,
    whatever the precision.

    Args:
        context: This rank's view of the stage.
        checkpoint: The last checkpoint of `train/`.

    Raises:
        CheckpointError: The opponent or the checkpoint cannot be read.
        ExportError: The adapter could not be written, or differs when read back.
    """
    here, lora = context.here, context.config.model.lora
    engine, architecture = context.build_engine(
        here.opponent, lambda chunks, architecture: load_weights(chunks, here.opponent, architecture)
    )
    attach(engine.chunks, lora, runtime=context.runtime, seed="")  # A comes from the checkpoint
    load_checkpoint(engine, checkpoint)
    if lora.export_adapter:
        export_adapter(
            engine.chunks,
            lora,
            architecture=architecture,
            base=(context.run.iteration(0) if context.iteration else here).opponent.resolve(),
            earlier=context.run.iteration(context.iteration - 1).adapter if context.iteration else None,
            out_dir=here.adapter,
            dtype=engine.chunks[0].config.params_dtype,
            inputs=context.inputs,
        )
    rounding = merge(engine.chunks)
    if rounding > _MUCH_ROUNDING:
        context.progress.note(
            f"rounding the merged weights lost {rounding:.0%} of what the adapters learned; a higher "
            "spin.lr, more steps or a model in float32 keep more"
        )
    return engine, architecture
