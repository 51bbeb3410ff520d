"""An export that does not read back as the model is no export: the next start makes it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_spin.bridge.checkpoint_files import open_checkpoint
from nemo_spin.data.files import read_manifest
from tests import models, prepared
from tests.distributed.harness import run_ranks

LAST_LAYER = "model.layers.1.mlp.down_proj.weight"  # of the second stage of two


def _flip_last_bit(directory: Path) -> None:
    """As a disk that loses one."""
    tensor = open_checkpoint(directory).tensors[LAST_LAYER]
    with tensor.file.open("r+b") as stream:
        stream.seek(tensor.offset + tensor.size - 1)
        byte = stream.read(1)[0]
        stream.seek(tensor.offset + tensor.size - 1)
        stream.write(bytes([byte ^ 1]))


def _export_twice(model_dir: Path, run_dir: Path) -> Any:
    """What the ranks' first export raises, what it leaves, and the manifest of the second."""
    import torch

    from nemo_spin.bridge.export_hf import verify_export
    from nemo_spin.bridge.import_hf import load_weights
    from nemo_spin.config.schema import Config, ModelConfig, TrainerConfig
    from nemo_spin.data.progress import SilentProgress
    from nemo_spin.errors import ExportError
    from nemo_spin.megatron.checkpoint import save_checkpoint
    from nemo_spin.megatron.runtime import initialize
    from nemo_spin.selfplay.ranks import export as stage
    from nemo_spin.selfplay.ranks.context import StageContext
    from nemo_spin.selfplay.run_directory import RunDirectory

    config = Config(
        model=ModelConfig(path=str(model_dir), pipeline_model_parallel_size=2),
        trainer=TrainerConfig(precision="32"),
    )
    runtime = initialize(tensor_model_parallel_size=1, pipeline_model_parallel_size=2, seed=1, timeout_s=60)
    context = StageContext(config, RunDirectory(run_dir), 0, runtime, SilentProgress(), {"trained": "abc"})
    engine, _ = context.build_engine(
        model_dir, lambda chunks, architecture: load_weights(chunks, model_dir, architecture)
    )
    save_checkpoint(engine, context.here.train / "checkpoints", step=1, common={}, keep=1)

    def altered_before(chunks: Any, directory: Path, architecture: Any) -> None:
        """Stands in for a disk that gives back other bytes than were written; the gate is the real one."""
        if runtime.is_first_rank:
            _flip_last_bit(directory)
        torch.distributed.barrier()
        verify_export(chunks, directory, architecture)

    messages: list[Any] = [None] * runtime.world_size
    stage.verify_export = altered_before
    try:
        stage.export(context)
    except ExportError as error:
        torch.distributed.all_gather_object(messages, str(error))
    finally:
        stage.verify_export = verify_export
    left = [path.name for path in context.here.path.iterdir()]
    stage.export(context)
    return messages, left, read_manifest(context.here.model)


def test_a_difference_leaves_no_model_and_the_next_export_is_whole(tmp_path: Path) -> None:
    model_dir, run_dir = models.write_model(tmp_path / "model"), tmp_path / "run"
    prepared.write(run_dir / "data", train=prepared.rows(4, seed=1))
    (run_dir / "iter_00").mkdir()
    (run_dir / "iter_00" / "opponent").symlink_to(model_dir)
    messages, left, manifest = run_ranks(_export_twice, 2, model_dir, run_dir)
    assert all(f"tensor {LAST_LAYER}" in message for message in messages), "on all ranks"
    assert all("start the same command again: it exports anew" in message for message in messages)
    assert sorted(left) == ["canary.json", "opponent", "train"]
    assert manifest is not None
    assert manifest.inputs == {"trained": "abc"}
    exported, source = (open_checkpoint(path) for path in (run_dir / "iter_00" / "model", model_dir))
    for name, tensor in source.tensors.items():
        whole = tuple((0, size) for size in tensor.shape)
        assert (exported.read(name, whole) == source.read(name, whole)).all()
