"""What an export takes over beside the weights, and what a stranger's directory cannot slip into it."""

import json
from pathlib import Path

import pytest

from nemo_spin.bridge.checkpoint_files import check_checkpoint
from nemo_spin.bridge.companions import copy_companions
from nemo_spin.bridge.export_files import files_in
from nemo_spin.errors import CheckpointError
from tests.unit.bridge.checkpoints import edit_config, make_checkpoint


def test_companions_are_copied_and_code_is_not(tmp_path: Path) -> None:
    source, target = make_checkpoint(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    copied = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "LICENSE.txt": "the licence",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
    }
    left = {
        "modeling_evil.py": "boom()",
        "README.md": "another card",
        "training_args.bin": "x",
        "notes.txt": "x",
    }
    for name, text in {**copied, **left}.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    copy_companions(source, target, dtype="F32")
    assert files_in(target) == sorted([*copied, "config.json", "generation_config.json"])
    for name, text in copied.items():
        assert (target / name).read_text() == text
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_another_dtype_is_told_in_the_configuration(tmp_path: Path, key: str) -> None:
    source, target = make_checkpoint(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    edit_config(source, remove=("dtype",))
    edit_config(source, **{key: "float32"})
    copy_companions(source, target, dtype="BF16")
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, target))
    assert after == {**before, key: "bfloat16"}


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "additional_chat_templates/tools.jinja"])
def test_a_link_to_a_private_file_is_refused_and_not_copied(tmp_path: Path, name: str) -> None:
    source, target = make_checkpoint(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    (tmp_path / "id_ed25519").write_text("secret")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(tmp_path / "id_ed25519")
    for action in (lambda: copy_companions(source, target, dtype="F32"), lambda: check_checkpoint(source)):
        with pytest.raises(CheckpointError, match="id_ed25519") as caught:
            action()
        assert str(source / name) in str(caught.value)
        assert "remedy:" in str(caught.value)
    assert files_in(target) == []


def test_links_into_the_hubs_cache_and_to_the_same_name_are_files_like_others(tmp_path: Path) -> None:
    source, target = make_checkpoint(tmp_path / "snapshots" / "0abc"), tmp_path / "target"
    target.mkdir()
    (tmp_path / "blobs").mkdir()
    (source / "config.json").rename(tmp_path / "blobs" / "e3b0c44298fc1c14")
    (source / "config.json").symlink_to(Path("../../blobs/e3b0c44298fc1c14"))
    (tmp_path / "LICENSE").write_text("the licence")
    (source / "LICENSE").symlink_to(tmp_path / "LICENSE")
    check_checkpoint(source)
    copy_companions(source, target, dtype="F32")
    assert files_in(target) == ["LICENSE", "config.json", "generation_config.json"]
    assert not any(path.is_symlink() for path in target.iterdir())
