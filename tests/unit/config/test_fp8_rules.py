from __future__ import annotations

import pytest

from nemo_spin.config.fp8_rules import check_fp8_fits
from nemo_spin.config.load import from_mapping
from nemo_spin.config.schema import Config
from nemo_spin.config.validate import find_mistakes
from nemo_spin.errors import ConfigError

LLAMA_8B = {
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "head_dim": 128,
}


def configured(tensor_parallel: int = 1, **settings: object) -> Config:
    model = {"fp8": "hybrid", "tensor_model_parallel_size": tensor_parallel}
    values = {
        "model": model,
        "spin": {"gates": {"ln2_tolerance": 0.01}},
        "trainer": {"devices": tensor_parallel},
    }
    for key, value in settings.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return from_mapping(values)


def mistakes(config: Config) -> list[str]:
    return [entry.text.split(":")[0] for entry in find_mistakes(config, command=None)]


def test_eight_bits_with_what_they_need() -> None:
    assert mistakes(configured()) == []
    assert mistakes(configured(spin__gates={"ln2_tolerance": None})) == []
    assert mistakes(configured(model__fp8=None, trainer__accelerator="cpu")) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.accelerator", "cpu"),
        ("trainer.precision", "32"),
        ("model.transformer_impl", "local"),
        ("model.fp8_recipe", "nvfp4"),
        ("model.fp8", "fp8"),
    ],
)
def test_eight_bits_without_what_they_need(key: str, value: str) -> None:
    assert mistakes(configured(**{key.replace(".", "__"): value})) == [key]


def test_the_gate_must_allow_for_rounding() -> None:
    (entry,) = find_mistakes(configured(spin__gates={"ln2_tolerance": 1e-3}), command=None)
    assert "spin.gates.ln2_tolerance" in entry.text and "set it to 0.01" in entry.text


def test_widths_that_fit() -> None:
    check_fp8_fits(configured(8), **LLAMA_8B)
    check_fp8_fits(configured(model__fp8=None), **(LLAMA_8B | {"hidden_size": 7}))


def test_widths_that_do_not_fit_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        check_fp8_fits(configured(2, model__fp8_recipe="mxfp8"), **(LLAMA_8B | {"hidden_size": 4112}))
    assert "hidden size are 4112" in str(caught.value)
    assert "multiples of 32" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        check_fp8_fits(
            configured(4),
            hidden_size=512,
            ffn_hidden_size=1376,
            num_attention_heads=8,
            num_query_groups=4,
            head_dim=20,
        )
    message = str(caught.value)
    # 1376 / 4 = 344 = 21.5 x 16; 8 x 20 / 4 = 40 = 2.5 x 16; 2 x 4 x 20 / 4 = 40
    assert "MLP columns of each of 4 ranks are 344" in message
    assert "query channels of each of 4 ranks are 40" in message
    assert "key and value channels of each of 4 ranks are 40" in message
    assert "hidden size" not in message
