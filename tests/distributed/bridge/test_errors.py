"""What goes wrong on one rank is raised on all, in time, and leaves nothing half done."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_spin.bridge.checkpoint_files import check_checkpoint, open_checkpoint
from tests.distributed.bridge import ranks
from tests.distributed.harness import run_ranks
from tests.unit.bridge.checkpoints import edit_config, make_checkpoint

LAST_LAYER = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_full_disk_ends_all_ranks_and_spares_the_earlier_export(tmp_path: Path, failing_rank: int) -> None:
    source = make_checkpoint(tmp_path / "source")
    target = tmp_path / "target"
    run_ranks(ranks.convert, 1, 1, 1, source, target, {})
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    outcomes = run_ranks(ranks.export_without_room, 2, 2, source, target, failing_rank)
    for kind, message in outcomes:
        assert kind in ("ExportError", "DataError")
        assert str(target) in message
        assert "File too large" in message
        assert "remedy:" in message
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_the_gate_names_a_tensor_of_the_last_stage_on_all_ranks(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    target = tmp_path / "target"
    run_ranks(ranks.convert, 1, 1, 1, source, target, {"max_shard_bytes": 10**9})
    tensor = open_checkpoint(target).tensors[LAST_LAYER]
    with (target / "model.safetensors").open("r+b") as stream:
        stream.seek(tensor.offset + tensor.size - 1)
        byte = stream.read(1)[0]
        stream.seek(tensor.offset + tensor.size - 1)
        stream.write(bytes([byte ^ 1]))
    outcomes = run_ranks(ranks.gate_after_change, 4, 2, 2, source, target)
    assert {kind for kind, _ in outcomes} == {"ExportError"}
    assert all(LAST_LAYER in message and "model.safetensors" in message for _, message in outcomes)


def _spoilt(directory: Path, value: float) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[LAST_LAYER][0, 0] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_values_that_only_the_last_stage_reads_end_all_ranks(tmp_path: Path) -> None:
    good, bad = make_checkpoint(tmp_path / "good"), make_checkpoint(tmp_path / "bad")
    _spoilt(bad, float("nan"))
    outcomes = run_ranks(ranks.load, 2, 1, 2, bad, good)
    assert [kind for kind, _ in outcomes] == ["CheckpointError", "CheckpointError"]
    assert all(LAST_LAYER in message for _, message in outcomes)


def test_a_truncated_file_is_refused_before_any_parameter_changes(tmp_path: Path) -> None:
    good, bad = make_checkpoint(tmp_path / "good"), make_checkpoint(tmp_path / "bad")
    os.truncate(bad / "model.safetensors", 30_000)
    outcomes = run_ranks(ranks.load, 2, 2, 1, bad, good)
    assert [kind for kind, _ in outcomes] == ["CheckpointError", "CheckpointError"]
    assert all("truncated" in message for _, message in outcomes)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    good = make_checkpoint(tmp_path / "good")
    other = make_checkpoint(tmp_path / "other", vocab_size=97)
    outcomes = run_ranks(ranks.load, 1, 1, 1, other, good)
    assert "model.embed_tokens.weight" in outcomes[0][1]


def test_diverged_weights_are_exported_truly_and_refused_to_the_sampler(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[LAST_LAYER] = torch.full_like(tensors[LAST_LAYER], 1e30)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    edit_config(source, dtype="float16")  # in which 1e30 is infinite
    run_ranks(ranks.convert, 1, 1, 1, source, tmp_path / "target", {})
    with pytest.raises(Exception, match=LAST_LAYER):
        check_checkpoint(tmp_path / "target")
