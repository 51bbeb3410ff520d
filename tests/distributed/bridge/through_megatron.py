"""What ranks do between a Hugging Face directory and a distributed checkpoint of Megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def _engine(settings: dict[str, Any], source: Path) -> tuple[Any, Any]:
    """A model of unloaded weights in an engine, as the commands build it, and its architecture."""
    import torch

    from nemo_spin.bridge.families import architecture_of
    from nemo_spin.config.schema import ModelConfig
    from nemo_spin.megatron import provider, runtime
    from nemo_spin.megatron.engine import Engine, layout_of

    model = ModelConfig(path=str(source), **settings)
    place = runtime.initialize(
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
        seed=1,
        timeout_s=60,
    )
    architecture = architecture_of(source)
    chunks = provider.build_model(architecture, model, params_dtype=torch.float32)
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        parameter.data.fill_(float("nan"))  # whatever is not loaded shows
    return Engine(chunks, place, architecture.vocab_size, layout_of(model)), architecture


def write(settings: dict[str, Any], source: Path, checkpoint: Path) -> None:
    """Imports `source` and saves it as Megatron does."""
    from nemo_spin.bridge.import_hf import load_weights
    from nemo_spin.megatron.checkpoint import save_checkpoint

    engine, architecture = _engine(settings, source)
    load_weights(engine.chunks, source, architecture)
    save_checkpoint(engine, checkpoint, step=0, common={}, keep=1)


def read(settings: dict[str, Any], source: Path, checkpoint: Path, target: Path) -> None:
    """Exports to `target` what `write` has saved; `source` describes the model."""
    from nemo_spin.bridge.export_hf import export_weights, verify_export
    from nemo_spin.data.progress import SilentProgress
    from nemo_spin.megatron.checkpoint import load_checkpoint
    from nemo_spin.megatron.checkpoint_files import latest_checkpoint

    engine, architecture = _engine(settings, source)
    saved = latest_checkpoint(checkpoint)
    assert saved is not None
    load_checkpoint(engine, saved)
    export_weights(
        engine.chunks,
        architecture=architecture,
        source_dir=source,
        out_dir=target,
        progress=SilentProgress(),
        max_shard_bytes=20_000,
    )
    verify_export(engine.chunks, target, architecture)
