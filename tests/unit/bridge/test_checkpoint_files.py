"""Whatever can be wrong with a directory is refused, by the name of the tensor or file."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_spin.bridge import checkpoint_files
from nemo_spin.bridge.checkpoint_files import (
    check_checkpoint,
    num_parameters,
    open_checkpoint,
    weights_sha256,
)
from nemo_spin.bridge.safetensors_format import read_header
from nemo_spin.data.files import write_manifest
from nemo_spin.errors import CheckpointError
from tests.unit.bridge.checkpoints import CLASSES, edit_config, make_checkpoint

DOWN = "model.layers.1.mlp.down_proj.weight"


def _change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _change_index(directory: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def _refused(directory: Path, *named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(directory)
    for name in (*named, "rule:", "remedy:"):
        assert name in str(caught.value)


@pytest.mark.parametrize("shards", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", CLASSES)
def test_what_transformers_saves_passes(tmp_path: Path, family: str, dtype: str, shards: bool) -> None:
    make_checkpoint(tmp_path, family, dtype=dtype, shards=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    assert check_checkpoint(tmp_path).torch_dtype == dtype


def test_regions_are_read_bit_for_bit(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, dtype="bfloat16", shards=True)
    checkpoint = open_checkpoint(tmp_path)
    expected = load_file(checkpoint.tensors[DOWN].file)[DOWN][3:9, 5:20].contiguous()
    bits = checkpoint.read(DOWN, ((3, 9), (5, 20)))
    np.testing.assert_array_equal(bits, expected.view(torch.int16).numpy())


def test_data_at_an_odd_offset_is_read_like_any_other(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, dtype="bfloat16")
    path = tmp_path / "model.safetensors"
    expected = open_checkpoint(tmp_path).read(DOWN, ((1, 4), (2, 5)))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes(
        (length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :]
    )
    assert open_checkpoint(tmp_path).tensors[DOWN].offset % 2 == 1
    np.testing.assert_array_equal(open_checkpoint(tmp_path).read(DOWN, ((1, 4), (2, 5))), expected)
    check_checkpoint(tmp_path)


def test_parameters_are_counted_by_headers(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert num_parameters(tmp_path) == sum(tensor.numel() for tensor in tensors.values())


def test_a_missing_tensor(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    _change_tensors(tmp_path, lambda tensors: tensors.pop(DOWN))
    _refused(tmp_path, DOWN, "lacks")


def test_a_surplus_tensor(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    _change_tensors(tmp_path, lambda tensors: tensors.update(extra=torch.zeros(2)))
    _refused(tmp_path, "extra")


def test_regions_are_found_in_their_file_and_may_be_asked_for_to_its_end(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path))
    stored = checkpoint.tensors[DOWN]
    row_bytes = 4 * stored.shape[1]
    file, first = checkpoint.position(DOWN, ((0, 1), (0, stored.shape[1])))
    assert (file, first) == (str(stored.file), stored.offset)
    assert checkpoint.position(DOWN, ((3, 9), (5, 20))) == (file, first + 3 * row_bytes)
    before = checkpoint.read(DOWN, ((3, 9), (5, 20)))
    for _ in range(2):  # the file is shorter than what is asked for at once
        checkpoint.ask_for(DOWN, ((3, 9), (5, 20)))
    np.testing.assert_array_equal(checkpoint.read(DOWN, ((3, 9), (5, 20))), before)


def test_biases_that_the_family_has_not(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen2")
    edit_config(tmp_path, architectures=["LlamaForCausalLM"], head_dim=4, model_type="llama")
    _refused(tmp_path, "q_proj.bias")


def test_old_buffers_and_a_stored_copy_of_tied_embeddings_are_no_surplus(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tie_word_embeddings=True)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    _change_tensors(tmp_path, add)
    check_checkpoint(tmp_path)


def test_an_output_layer_is_missing_where_embeddings_are_not_tied(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    edit_config(tmp_path, tie_word_embeddings=False)
    _refused(tmp_path, "lm_head.weight")


def test_a_wrong_shape(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    _change_tensors(tmp_path, lambda tensors: tensors.update({DOWN: tensors[DOWN].T.contiguous()}))
    _refused(tmp_path, DOWN, "[36, 24]", "[24, 36]")


def test_a_configuration_that_contradicts_the_weights(tmp_path: Path) -> None:
    edit_config(make_checkpoint(tmp_path), vocab_size=90)
    _refused(tmp_path, "model.embed_tokens.weight", "[89, 24]", "[90, 24]")


def test_fewer_layers_in_the_configuration_than_stored(tmp_path: Path) -> None:
    edit_config(make_checkpoint(tmp_path), num_hidden_layers=1)
    _refused(tmp_path, "model.layers.1.")


def test_a_quantised_tensor(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    _change_tensors(tmp_path, lambda tensors: tensors.update({DOWN: tensors[DOWN].to(torch.int8)}))
    _refused(tmp_path, DOWN, "I8")


@pytest.mark.parametrize("shards", [False, True], ids=["single", "sharded"])
def test_a_truncated_file(tmp_path: Path, shards: bool) -> None:
    make_checkpoint(tmp_path, shards=shards)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    os.truncate(file, file.stat().st_size - 1)
    _refused(tmp_path, file.name, "truncated")


def test_a_missing_file(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=True)
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    file.unlink()
    _refused(tmp_path, file.name)


def test_a_file_that_fails_while_it_is_checked_is_an_error_and_no_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read through a map, a page that is not there would kill the command."""
    make_checkpoint(tmp_path, "llama")
    path = tmp_path / "model.safetensors"

    def open_and_lose(*arguments: Any) -> checkpoint_files.Checkpoint:
        checkpoint = open_model(*arguments)
        os.truncate(path, path.stat().st_size // 2)
        return checkpoint

    open_model = checkpoint_files.open_model
    monkeypatch.setattr(checkpoint_files, "open_model", open_and_lose)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: ends at byte \d+, before the last tensor"
    ):
        check_checkpoint(tmp_path)

    def evicted(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint_files, "open_model", open_model)
    path.unlink()
    make_checkpoint(tmp_path, "llama")
    monkeypatch.setattr(os, "preadv", evicted)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(Input/output error\)"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_that_are_not_finite(tmp_path: Path, dtype: str, value: float) -> None:
    make_checkpoint(tmp_path, dtype=dtype)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[DOWN][23, 35] = value

    _change_tensors(tmp_path, spoil)
    _refused(tmp_path, DOWN, "NaN")
    check_checkpoint(tmp_path, finite=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_largest_finite_value_passes(tmp_path: Path, dtype: str) -> None:
    make_checkpoint(tmp_path, dtype=dtype)

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[DOWN][0, 0] = torch.finfo(tensors[DOWN].dtype).max
        tensors[DOWN][0, 1] = torch.finfo(tensors[DOWN].dtype).min

    _change_tensors(tmp_path, enlarge)
    check_checkpoint(tmp_path)


def test_values_are_checked_beyond_the_first_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_spin.bridge.checkpoint_files._CHECK_BYTES", 64)
    test_values_that_are_not_finite(tmp_path, "bfloat16", float("nan"))


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "x.bin", 3, None, "a\\b"]
)
def test_an_index_that_leaves_the_directory(tmp_path: Path, name: object) -> None:
    make_checkpoint(tmp_path / "in", shards=True)
    make_checkpoint(tmp_path)
    _change_index(tmp_path / "in", lambda weight_map: weight_map.update({DOWN: name}))  # type: ignore[dict-item]
    _refused(tmp_path / "in", "model.safetensors.index.json", repr(name))


def test_a_snapshot_of_links_as_in_the_hubs_cache_passes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "blobs", shards=True)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(Path("..") / "blobs" / file.name)
    check_checkpoint(tmp_path / "snapshot")


def test_an_index_that_names_the_wrong_file(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=True)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    right = open_checkpoint(tmp_path).tensors[DOWN].file.name
    wrong = next(name for name in files if name != right)
    _change_index(tmp_path, lambda weight_map: weight_map.update({DOWN: wrong}))
    _refused(tmp_path, DOWN, wrong, right)


def test_an_index_with_a_tensor_that_no_file_has(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=True)
    file = next(iter(tmp_path.glob("*.safetensors"))).name
    _change_index(tmp_path, lambda weight_map: weight_map.update({"nowhere": file}))
    _refused(tmp_path, "nowhere", file)


def test_an_index_without_a_tensor_that_a_file_has(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=True)
    _change_index(tmp_path, lambda weight_map: weight_map.pop(DOWN))
    _refused(tmp_path, DOWN)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    make_checkpoint(tmp_path, shards=True)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    _refused(tmp_path, "model.safetensors.index.json")


def test_a_single_file_beside_an_index_that_does_not_mean_it(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=True)
    make_checkpoint(tmp_path)
    _refused(tmp_path, "model.safetensors")


def test_shards_without_an_index(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=True)
    (tmp_path / "model.safetensors.index.json").unlink()
    _refused(tmp_path, "model.safetensors.index.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json"])
def test_pickles_are_refused_with_a_hint_and_never_opened(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / name)  # whoever opens it waits for ever
    _refused(tmp_path, name, "pickle", f"M.from_pretrained('{tmp_path}', dtype='auto').save_pretrained(")


def test_no_weights_at_all(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    _refused(tmp_path, str(tmp_path), "save_pretrained(")


def test_a_hash_follows_weights_configuration_and_tokenizer_and_nothing_else(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    first = weights_sha256(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    assert weights_sha256(tmp_path) == first
    (tmp_path / "tokenizer.json").write_text("{}")
    second = weights_sha256(tmp_path)
    edit_config(tmp_path, rms_norm_eps=1e-4)
    third = weights_sha256(tmp_path)
    _change_tensors(tmp_path, lambda tensors: tensors[DOWN].mul_(2))
    assert len({first, second, third, weights_sha256(tmp_path)}) == 4


def test_a_hash_with_a_manifest_equals_one_without(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=True)
    plain = weights_sha256(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    write_manifest(tmp_path, stage="export", files=files, inputs={}, counts={})
    assert weights_sha256(tmp_path) == plain


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"files": 3}', '{"stage": "x", "files": {"config.json": 1}}']
)
def test_a_manifest_that_is_not_ours_does_not_matter_to_the_hash(tmp_path: Path, content: str) -> None:
    make_checkpoint(tmp_path)
    plain = weights_sha256(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    assert weights_sha256(tmp_path) == plain


def test_checking_needs_no_torch(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    code = (
        "import sys; from pathlib import Path\n"
        "from nemo_spin.bridge.checkpoint_files import check_checkpoint, weights_sha256\n"
        "check_checkpoint(Path(sys.argv[1])); weights_sha256(Path(sys.argv[1]))\n"
        "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_headers_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors"):
        read_header(tmp_path / "nowhere.safetensors")
