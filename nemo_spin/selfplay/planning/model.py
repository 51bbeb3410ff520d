"""The model to plan for: a Hugging Face directory, its config.json alone, or a hub id."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from nemo_spin.bridge.families import families
from nemo_spin.bridge.families.table import Family
from nemo_spin.bridge.hf_config import CONFIG_NAME, read_architecture, read_json
from nemo_spin.errors import CheckpointError, explain
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.megatron.sizes import ModelShape, shape_of

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_MOST = 10_000  # layers, experts: beyond it the file is wrong
_UNKNOWN_ATTENTION = ("kv_lora_rank", "q_lora_rank")  # DeepSeek's compressed keys and values
_DENSE_KIN = {"Qwen3": "qwen3", "Qwen2": "qwen2", "Mixtral": "mistral"}  # whose layers a mixture has


@dataclass(frozen=True)
class PlannedModel:
    """What is planned for.

    Attributes:
        name: For titles: the directory or hub id as it was given.
        shape: Its sizes.
        architecture: What the bridge reads; None where it does not support the model yet.
    """

    name: str
    shape: ModelShape
    architecture: Architecture | None


def read_model(path: str) -> PlannedModel:
    """Reads configuration only; of a hub id, config.json is downloaded and nothing else.

    Raises:
        CheckpointError: There is no such model, or its layers are not known.
    """
    config_path = _config_path(path)
    config = read_json(config_path)
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    family = next((family for family in families() if name in family.architectures), None)
    _check_sizes(config, config_path)
    count_key = next((key for key in _EXPERT_COUNTS if config.get(key)), None)
    if family is not None and count_key is None:
        architecture = read_architecture(config_path.parent, config, family)
        return PlannedModel(path, shape_of(architecture), architecture)
    if name is None or count_key is None:
        supported = ", ".join(entry for family in families() for entry in family.architectures)
        raise _unusable(
            f"{config_path}: architectures", repr(names), f"known are {supported}, and mixtures of experts"
        )
    shape = _mixture(config, count_key, _kin(name), config_path)
    return PlannedModel(path, shape, _supported(config, family, config_path.parent))


def _supported(config: dict[str, Any], family: Family | None, directory: Path) -> Architecture | None:
    """What the bridge makes of a mixture of experts; None where it refuses it."""
    if family is None:
        return None
    try:
        return read_architecture(directory, config, family)
    except CheckpointError:
        return None


def _config_path(path: str) -> Path:
    given = Path(path).expanduser()
    if given.is_dir():
        return given / CONFIG_NAME
    if given.exists() or not _HUB_ID.fullmatch(path):
        if given.is_file():
            return given
        raise _unusable(f"model {path}", "there is no such file or directory", _RULE)
    return _download(path)


def _download(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(hub_id, CONFIG_NAME, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(hf_hub_download(hub_id, CONFIG_NAME))
    except Exception as error:  # the hub client raises dozens of types: network, rights, names
        said = str(error).splitlines()[0] if str(error) else repr(error)
        raise _unusable(f"model {hub_id}", f"could not be downloaded ({said})", _RULE) from error


_RULE = "a Hugging Face directory, its config.json, or the id of a model on the hub"


def _unusable(what: str, found: str, rule: str) -> CheckpointError:
    return CheckpointError(
        explain(what, found=found, rule=rule, remedy="check --model (or model.path), or choose another model")
    )


def _kin(name: str) -> Family:
    kin = next((family for start, family in _DENSE_KIN.items() if name.startswith(start)), "llama")
    return next(family for family in families() if family.name == kin)


def _mixture(config: Mapping[str, Any], count_key: str, kin: Family, path: Path) -> ModelShape:
    """A mixture of experts: the layers of a dense relative, with other MLPs."""
    for key in _UNKNOWN_ATTENTION:
        if config.get(key) is not None:
            raise _unusable(f"{path}: {key}", repr(config[key]), "attention over whole key/value heads")
    width = config.get("moe_intermediate_size") or config.get("intermediate_size")
    dense = {"intermediate_size": width, **config, "model_type": kin.name}
    shape = shape_of(read_architecture(path.parent, dense, kin))
    counts = {
        count_key: config[count_key],
        "num_experts_per_tok": config.get("num_experts_per_tok"),
        "moe_intermediate_size (or intermediate_size)": width,
    }
    for key, value in counts.items():
        if not _is_count(value):
            raise _unusable(f"{path}: {key}", repr(value), "is a positive whole number")
    experts, chosen = int(config[count_key]), int(config["num_experts_per_tok"])
    if chosen > experts:
        raise _unusable(f"{path}: num_experts_per_tok", str(chosen), f"at most {count_key}, {experts}")
    shared = config.get("shared_expert_intermediate_size") or 0
    if _is_count(config.get("n_shared_experts")):
        shared = config["n_shared_experts"] * width
    return replace(
        shape,
        num_moe_layers=_moe_layers(config, shape.num_layers),
        num_experts=experts,
        experts_per_token=chosen,
        moe_ffn_hidden_size=int(counts["moe_intermediate_size (or intermediate_size)"]),
        shared_ffn_hidden_size=int(shared) if _is_count(shared) else 0,
    )


def _moe_layers(config: Mapping[str, Any], num_layers: int) -> int:
    """Layers with experts: every `decoder_sparse_step`-th, those listed and the first ones left out."""
    step = config.get("decoder_sparse_step")
    step = step if _is_count(step) else 1
    listed = config.get("mlp_only_layers")
    dense = set(listed) if isinstance(listed, list) else set()
    first = config.get("first_k_dense_replace")
    first = first if _is_count(first) else 0
    return sum(i >= first and i not in dense and (i + 1) % step == 0 for i in range(num_layers))


def _check_sizes(config: Mapping[str, Any], path: Path) -> None:
    for key in ("num_hidden_layers", *_EXPERT_COUNTS):
        value = config.get(key)
        if _is_count(value) and value > _MOST:
            raise _unusable(f"{path}: {key}", str(value), f"at most {_MOST}")


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
