"""What an adapter in the format of `peft` consists of, beside the values; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_spin.bridge.families import family_of
from nemo_spin.bridge.mappings import ColumnParallel, QueryKeyValue, RowParallel, Shape
from nemo_spin.config.lora_rules import targets_of
from nemo_spin.config.schema import LoraConfig
from nemo_spin.errors import CheckpointError, explain
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.megatron.projections import PROJECTIONS

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def projection_names(architecture: Architecture, lora: LoraConfig) -> dict[str, str]:
    """Our name of each projection with an adapter -> its module in the Hugging Face model.

    The names have `{layer}` for the number of the layer.

    Raises:
        CheckpointError: The family stores several projections as one tensor.
    """
    targets = targets_of(lora, gated=architecture.gated)
    found: dict[str, str] = {}
    for linear, projections in PROJECTIONS.items():
        name = f"decoder.layers.{{layer}}.{linear}.weight"
        mapping = next((m for m in family_of(architecture).layer if m.megatron == name), None)
        stored: tuple[str, ...] = ()
        if isinstance(mapping, QueryKeyValue):
            stored = (mapping.query, mapping.key, mapping.value)
        elif isinstance(mapping, ColumnParallel):
            stored = mapping.hf
        elif isinstance(mapping, RowParallel):
            stored = (mapping.hf,)
        there = [name for name in projections if architecture.gated or name != "gate_proj"]
        if len(stored) != len(there):
            raise _not_separable(architecture, linear)
        found |= {ours: hf.removesuffix(".weight") for ours, hf in zip(there, stored, strict=True)}
    return {ours: found[ours] for ours in targets}


def _not_separable(architecture: Architecture, linear: str) -> CheckpointError:
    return CheckpointError(
        explain(
            "model.lora.export_adapter",
            found=f"{architecture.hf_architecture} does not store the projections of {linear} one by one",
            rule="an adapter of ours belongs to one linear layer of the Hugging Face model",
            remedy="set model.lora.export_adapter=false; the merged model is exported all the same",
        )
    )


def adapter_shapes(architecture: Architecture, lora: LoraConfig, *, count: int = 1) -> dict[str, Shape]:
    """Name and shape of every tensor of an adapter made of `count`, as `peft` writes them."""
    assert lora.rank is not None, "without a rank there are no adapters"
    names = projection_names(architecture, lora)
    stored = family_of(architecture).stored_shapes(architecture)
    shapes: dict[str, Shape] = {}
    for layer in range(architecture.num_layers):
        for module in names.values():
            here = module.format(layer=layer)
            rows, columns = stored[f"{here}.weight"]
            shapes[tensor_name(here, "A")] = (count * lora.rank, columns)
            shapes[tensor_name(here, "B")] = (rows, count * lora.rank)
    return shapes


def tensor_name(module: str, letter: str) -> str:
    """Of A or B of a module, as `peft` stores it."""
    return f"base_model.model.{module}.lora_{letter}.weight"


def peft_config(lora: LoraConfig, modules: Sequence[str], *, base: Path, count: int = 1) -> dict[str, Any]:
    """The content of `adapter_config.json`.

    Args:
        lora: The settings.
        modules: Modules of the Hugging Face model, such as `model.layers.{layer}.self_attn.q_proj`.
        base: Directory of the model that the adapter belongs to.
        count: How many adapters it is made of; their scale alpha / r stays.
    """
    assert lora.rank is not None, "without a rank there are no adapters"
    alpha = count * lora.alpha
    return {
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": count * lora.rank,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in modules}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
