"""`import-hf` and `export export.checkpoint=…`: checkpoints that did not come from self-play."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.harness import run_ranks
from tests.functional.commands import nemo_spin


def convert(command: str, tmp_path: Path, model: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return nemo_spin(
        command,
        f"run_dir={tmp_path / 'work'}",
        f"model.path={model}",
        *overrides,
    )


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A Megatron checkpoint of the tiny model, written by two tensor-parallel ranks."""
    directory = tmp_path_factory.mktemp("imported")
    done = convert(
        "import-hf", directory, tiny_model, "model.tensor_model_parallel_size=2", "trainer.devices=2"
    )
    assert done.returncode == 0, done.stderr
    return directory / "work" / "imported"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def assert_equal(found: Path, expected: Path) -> None:
    first, second = tensors(found), tensors(expected)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_out_again_at_another_layout_bit_for_bit(imported: Path, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "exports" / "model"
    wanted = (f"export.checkpoint={imported}", f"export.output={output}")
    layout = ("model.pipeline_model_parallel_size=2", "trainer.devices=2")
    done = convert("export", tmp_path, tiny_model, *wanted, *layout)
    assert done.returncode == 0, done.stderr
    assert_equal(output, tiny_model)
    assert (output / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    written = (output / "manifest.json").stat().st_mtime_ns
    assert convert("export", tmp_path, tiny_model, *wanted, *layout).returncode == 0
    assert (output / "manifest.json").stat().st_mtime_ns == written  # done is done


def test_what_is_no_export_is_never_replaced(imported: Path, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "precious"
    output.mkdir()
    (output / "thesis.txt").write_text("ten years")
    done = convert("export", tmp_path, tiny_model, f"export.checkpoint={imported}", f"export.output={output}")
    assert done.returncode == 2
    assert "is there, and no export" in done.stderr
    assert (output / "thesis.txt").read_text() == "ten years"


def test_a_checkpoint_that_is_none(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = convert(
        "export",
        tmp_path,
        tiny_model,
        f"export.checkpoint={tmp_path / 'empty'}",
        f"export.output={tmp_path / 'model'}",
    )
    assert done.returncode == 2
    assert "holds no metadata.json" in done.stderr
    assert not (tmp_path / "model").exists()


def test_an_output_must_be_named(imported: Path, tiny_model: Path, tmp_path: Path) -> None:
    done = convert("export", tmp_path, tiny_model, f"export.checkpoint={imported}")
    assert done.returncode == 2
    assert "export.output" in done.stderr


def _save_as_megatron_does(model: Path, directory: Path) -> None:
    """Runs in a rank: a checkpoint of weights alone, without what ours adds, in bfloat16."""
    from megatron.core import dist_checkpointing

    from nemo_spin.bridge.families import architecture_of
    from nemo_spin.bridge.import_hf import load_weights
    from nemo_spin.config.schema import ModelConfig
    from nemo_spin.megatron.provider import build_model
    from nemo_spin.megatron.runtime import initialize

    initialize(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=1)
    architecture = architecture_of(model)
    chunks = build_model(architecture, ModelConfig(path=str(model)), params_dtype=torch.bfloat16)
    load_weights(chunks, model, architecture)
    state: dict[str, Any] = {"model": chunks[0].sharded_state_dict()}
    directory.mkdir(parents=True)
    dist_checkpointing.save(state, str(directory), ("torch_dist", 1))


def test_a_checkpoint_of_megatron(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint, output = tmp_path / "iter_0000100", tmp_path / "model"
    run_ranks(_save_as_megatron_does, 1, tiny_model, checkpoint)
    done = convert(
        "export", tmp_path, tiny_model, f"export.checkpoint={checkpoint}", f"export.output={output}"
    )
    assert done.returncode == 0, done.stderr
    found, expected = tensors(output), tensors(tiny_model)
    assert all(torch.equal(found[name], expected[name].bfloat16().float()) for name in expected)


def test_a_damaged_checkpoint_is_refused_and_an_earlier_export_stays(
    imported: Path, tiny_model: Path, tmp_path: Path
) -> None:
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "model"
    shutil.copytree(imported, checkpoint)
    wanted = (f"export.checkpoint={checkpoint}", f"export.output={output}")
    assert convert("export", tmp_path, tiny_model, *wanted).returncode == 0
    for file in checkpoint.glob("**/*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    done = convert("export", tmp_path, tiny_model, *wanted)
    assert done.returncode == 2
    assert "checkpoint: was" in done.stderr
    assert_equal(output, tiny_model)
    done = convert("export", tmp_path, tiny_model, wanted[0], f"export.output={tmp_path / 'other'}")
    assert done.returncode == 2
    assert "cannot be loaded" in done.stderr
    assert not (tmp_path / "other").exists()
