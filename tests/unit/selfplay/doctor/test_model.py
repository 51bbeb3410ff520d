"""`nemo-spin doctor --model`: what it says of a model, and how fast."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nemo_spin import cli
from nemo_spin.errors import CheckpointError
from nemo_spin.selfplay.doctor.model import examine_model
from tests.unit.bridge.checkpoints import CLASSES, edit_config, make_checkpoint


@pytest.mark.parametrize("family", CLASSES)
def test_a_supported_model_is_described(tmp_path: Path, family: str) -> None:
    lines = examine_model(make_checkpoint(tmp_path, family))
    assert lines[-1] == "supported"
    assert CLASSES[family][1] in "\n".join(lines)
    assert "in 1 files (F32), with the names and shapes that config.json calls for" in lines[-2]


def test_what_matters_to_a_user_is_said(tmp_path: Path) -> None:
    text = "\n".join(examine_model(make_checkpoint(tmp_path, "gemma2")))
    assert "windows of 5 tokens in 1 layers, attention scores capped at 3.0, logits capped at 4.0" in text
    assert "Megatron's local ones, for norms after attention and MLP" in text
    assert "limit" not in text
    assert "sampler" not in text
    assert "sequences of 64 tokens" in "\n".join(examine_model(make_checkpoint(tmp_path / "b", "gpt2")))


@pytest.mark.parametrize("family", ["gpt_neo", "qwen2", "gpt2"])
def test_what_vllm_cannot_sample_is_said(tmp_path: Path, family: str) -> None:
    assert "sampler     vLLM " in "\n".join(examine_model(make_checkpoint(tmp_path, family)))


def test_every_property_that_is_not_supported_is_named(tmp_path: Path) -> None:
    edit_config(
        make_checkpoint(tmp_path, "gemma2"),
        hidden_activation="silu",
        use_bidirectional_attention=True,
        quantization_config={"quant_method": "gptq"},
    )
    with pytest.raises(CheckpointError) as caught:
        examine_model(tmp_path)
    for named in ("hidden_act", "use_bidirectional_attention", "quantization_config"):
        assert str(caught.value).count(f"config.json: {named}: ") == 1


def test_a_missing_number_is_named_once(tmp_path: Path) -> None:
    edit_config(make_checkpoint(tmp_path), remove=("vocab_size",), num_hidden_layers="two")
    with pytest.raises(CheckpointError) as caught:
        examine_model(tmp_path)
    assert str(caught.value).count("num_hidden_layers") == 2  # wrong, and then not there


def test_weights_are_checked_where_they_are(tmp_path: Path) -> None:
    edit_config(make_checkpoint(tmp_path), vocab_size=90)
    with pytest.raises(CheckpointError, match="embed_tokens"):
        examine_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "weights     none here: config.json alone was checked" in examine_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"\.bin"):
        examine_model(tmp_path)


def test_the_command_exits_with_0_or_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path)
    assert cli.main(["doctor", "--model", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("supported\n")
    edit_config(tmp_path, architectures=["BloomForCausalLM"])
    assert cli.main(["doctor", "--model", str(tmp_path)]) == 2
    assert "BloomForCausalLM" in capsys.readouterr().err


def test_neither_torch_nor_megatron_is_loaded_for_it(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    code = (
        "import sys; from nemo_spin import cli; "
        f"assert cli.main(['doctor', '--model', {str(tmp_path)!r}]) == 0; "
        "assert not {'torch', 'megatron.core', 'nemo', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
