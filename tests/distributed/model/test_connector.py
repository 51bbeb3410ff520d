""".nemo files: saved at one layout, restored at another, from strangers too."""

from __future__ import annotations

import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import reference
from tests.distributed.harness import run_ranks
from tests.distributed.model.test_fit import _write_scored


def _job(model_dir: Path, scored: Path, tensor: int, pipeline: int) -> Any:
    from nemo_spin.config.schema import ModelConfig
    from nemo_spin.model.settings import TrainingJob

    model = ModelConfig(
        path=str(model_dir),
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=tensor > 1,
        global_batch_size=4,
    )
    return TrainingJob(
        opponent=model_dir,
        rows=scored,
        objective="spin",
        spin={"loss": "logistic", "beta": 0.5},
        lr=1e-3,
        epochs=1,
        max_steps=None,
        seed=5,
        iteration=0,
        model=model,
        precision="32",
        ln2_tolerance=None,
        directory=scored.parent / "train",
        metrics_path=scored.parent / "metrics.jsonl",
        save_interval=None,
        save_top_k=1,
        async_save=False,
        carried=None,
        val_check_interval=None,
        log_every_n_steps=1,
    )


def _save(model_dir: Path, scored: Path, target: Path, tensor: int, pipeline: int, is_packed: bool) -> Any:
    from nemo_spin.megatron.runtime import initialize
    from nemo_spin.model.connector import MegatronSaveRestoreConnector
    from nemo_spin.model.spin_model import MegatronGPTSPINModel

    runtime = initialize(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, seed=1)
    model = MegatronGPTSPINModel(_job(model_dir, scored, tensor, pipeline), runtime)
    model.configure_model()
    connector = MegatronSaveRestoreConnector()
    connector.pack_nemo_file = is_packed
    model._save_restore_connector = connector
    model.save_to(target)
    return model.evaluate_heldout()


def _restore(target: Path, reference_dir: Path, scored: Path, tensor: int, pipeline: int) -> Any:
    from omegaconf import OmegaConf

    from nemo_spin.bridge.export_hf import verify_export
    from nemo_spin.bridge.families import architecture_of
    from nemo_spin.megatron.runtime import initialize
    from nemo_spin.model.connector import MegatronSaveRestoreConnector
    from nemo_spin.model.spin_model import MegatronGPTSPINModel

    runtime = initialize(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, seed=1)
    config = MegatronGPTSPINModel.restore_from(target, return_config=True)
    OmegaConf.update(config, "job.rows", str(scored))
    restored = MegatronGPTSPINModel.restore_from(
        target,
        override_config_path=config,
        save_restore_connector=MegatronSaveRestoreConnector(runtime=runtime),
    )
    verify_export(restored.engine.chunks, reference_dir, architecture_of(reference_dir))
    model = restored.job.model
    assert (model.tensor_model_parallel_size, model.pipeline_model_parallel_size) == (tensor, pipeline)
    return {
        "metrics": restored.evaluate_heldout(),
        "companions": sorted(path.name for path in restored.job.opponent.iterdir()),
        "beta": restored.job.spin["beta"],
    }


@pytest.mark.parametrize(
    ("saved", "restored", "is_packed"),
    [((2, 2), (1, 1), True), ((1, 1), (2, 1), True), ((1, 2), (2, 1), False)],
    ids=["2x2-1x1", "1x1-2x1", "directory"],
)
def test_weights_are_the_same_at_any_other_layout(
    tmp_path: Path, saved: tuple[int, int], restored: tuple[int, int], is_packed: bool
) -> None:
    model_dir = reference.make_model(tmp_path / "model")
    _write_scored(model_dir, tmp_path / "scored", shift=0.25)
    target = tmp_path / "elsewhere" / "policy.nemo"
    target.parent.mkdir()
    ranks = saved[0] * saved[1]
    before = run_ranks(_save, ranks, model_dir, tmp_path / "scored", target, *saved, is_packed)
    kept = shutil.move(model_dir, tmp_path / "kept")  # nothing is read from where the model came from
    if is_packed:
        assert [path.name for path in target.parent.iterdir()] == ["policy.nemo"]
        with tarfile.open(target) as tar:
            assert "./model_config.yaml" in tar.getnames() and "./hf/config.json" in tar.getnames()
    source = target if is_packed else target.parent
    result = run_ranks(
        _restore, restored[0] * restored[1], source, Path(kept), tmp_path / "scored", *restored
    )
    for name in ("loss", "policy_real_logps", "policy_generated_logps"):
        assert result["metrics"][name] == pytest.approx(before[name], rel=1e-5)
    assert result["companions"] == ["config.json", "generation_config.json"]
    assert result["beta"] == 0.5


def _restore_without_process_groups(target: Path) -> str:
    from nemo_spin.errors import ConfigError
    from nemo_spin.model.spin_model import MegatronGPTSPINModel

    try:
        MegatronGPTSPINModel.restore_from(target)
    except ConfigError as error:
        return str(error)
    return "no error"


def test_without_process_groups_it_says_what_to_pass(tmp_path: Path) -> None:
    (tmp_path / "policy.nemo").write_bytes(b"")
    message = run_ranks(_restore_without_process_groups, 1, tmp_path / "policy.nemo")
    assert "trainer=" in message and "remedy" in message


def _intruder(module: str, name: str, argument: str) -> bytes:
    """A pickle (protocol 4) that calls `module.name(argument)` when it is read."""

    def text(value: str) -> bytes:
        return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()

    call = text(module) + text(name) + pickle.STACK_GLOBAL + text(argument) + pickle.TUPLE1
    return pickle.PROTO + b"\x04" + call + pickle.REDUCE + pickle.STOP


def _read_index(path: Path) -> str:
    from nemo_spin.errors import CheckpointError
    from nemo_spin.megatron.sharded_weights import load_sharded_weights

    try:
        load_sharded_weights([], path)
    except CheckpointError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("torch.distributed.checkpoint.metadata", "os.system"),  # what a harmless module imports
        ("torch", "float32.__class__"),
    ],
)
def test_an_index_that_would_run_something_is_refused(tmp_path: Path, module: str, name: str) -> None:
    (tmp_path / ".metadata").write_bytes(_intruder(module, name, f"touch {tmp_path / 'x'}"))
    message = run_ranks(_read_index, 1, tmp_path)
    assert f"names {module}.{name}" in message
    assert not (tmp_path / "x").exists()


def test_the_intruder_would_have_run_something(tmp_path: Path) -> None:
    pickle.loads(_intruder("os", "system", f"touch {tmp_path / 'x'}"))  # noqa: S301 - our own
    assert (tmp_path / "x").exists()
