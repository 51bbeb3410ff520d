"""What can and what cannot have adapters."""

from __future__ import annotations

import pytest

from nemo_spin.config.lora_rules import (
    LORA_TARGETS,
    experts_have_no_adapters,
    gate_is_there,
    targets_of,
)
from nemo_spin.config.schema import LoraConfig
from tests.unit.config.test_validate import accepted, configured, refused


def test_adapters_of_any_kind_are_accepted() -> None:
    accepted("model.lora.rank=16")
    accepted(
        "model.lora.rank=1",
        "model.lora.alpha=0.5",
        "model.lora.dropout=0.1",
        "model.lora.target_modules=[v_proj,q_proj]",
        "model.lora.export_adapter=true",
    )


def test_every_unknown_layer_is_reported_with_the_one_that_was_meant() -> None:
    message = refused("model.lora.target_modules=[q_prj,k_proj,lm_head]")
    assert "model.lora.target_modules: 'q_prj'" in message and "did you mean `q_proj`?" in message
    assert "model.lora.target_modules: 'lm_head'" in message


@pytest.mark.parametrize(
    ("given", "found"),
    [("[]", "an empty list"), ("[q_proj,k_proj,q_proj]", "with q_proj twice")],
)
def test_layers_are_named_once(given: str, found: str) -> None:
    assert found in refused("model.lora.rank=4", f"model.lora.target_modules={given}")


def test_there_is_no_adapter_to_export_without_a_rank() -> None:
    assert refused("model.lora.export_adapter=true").startswith("model.lora.export_adapter: true, with")


def test_the_sampler_loads_adapters_that_are_there_and_not_too_large() -> None:
    served = ("generation.adapters=true", "model.lora.export_adapter=true")
    accepted(*served, "model.lora.rank=128", "spin.iterations=4")
    message = refused(*served, "model.lora.rank=128", "spin.iterations=5")
    assert "at most; that of the last has 640" in message
    server = ("generation.engine=vllm_server", "generation.server=http://127.0.0.1:8000")
    message = refused(*served, "model.lora.rank=8", *server)
    assert message.startswith("generation.adapters: true, with generation.engine vllm_server")
    message = refused("generation.adapters=true", "model.lora.rank=8")
    assert message.startswith("generation.adapters: true, with model.lora.export_adapter false")


def test_new_adapters_do_not_start_from_the_optimizer_state_of_merged_ones() -> None:
    accepted("model.optim.carry_over=true")
    message = refused("model.lora.rank=8", "model.optim.carry_over=true")
    assert message.startswith("model.optim.carry_over: true, with model.lora.rank 8")


def test_a_nemo_file_would_lack_the_adapters() -> None:
    key = "exp_manager.checkpoint_callback_params.save_nemo_on_train_end"
    accepted(f"{key}=true")
    assert refused("model.lora.rank=8", f"{key}=true").startswith(f"{key}: true, with model.lora.rank 8")


def test_targets_have_the_order_of_the_layers() -> None:
    assert targets_of(LoraConfig(), gated=True) == LORA_TARGETS
    assert targets_of(LoraConfig(target_modules=["v_proj", "q_proj"]), gated=True) == ("q_proj", "v_proj")
    assert "gate_proj" not in targets_of(LoraConfig(), gated=False)


def test_a_gate_that_is_not_there_has_no_adapter() -> None:
    config = configured("model.lora.rank=4", "model.lora.target_modules=[gate_proj,up_proj]")
    (mistake,) = gate_is_there(config, gated=False)
    assert "the model's MLP has no gate" in mistake.text
    assert gate_is_there(config, gated=True) == []
    assert gate_is_there(configured("model.lora.rank=4"), gated=False) == []
    assert gate_is_there(configured("model.lora.target_modules=[gate_proj]"), gated=False) == []


def test_experts_get_no_adapters() -> None:
    (mistake,) = experts_have_no_adapters(configured("model.lora.rank=4"), num_experts=8)
    assert mistake.keys == ("model.lora.rank",) and "8 experts in a layer" in mistake.text
    assert experts_have_no_adapters(configured("model.lora.rank=4"), num_experts=0) == []
    assert experts_have_no_adapters(configured(), num_experts=8) == []
