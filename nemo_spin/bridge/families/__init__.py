"""The model families, and how one is found for a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_spin.bridge.families.table import Family
from nemo_spin.errors import CheckpointError, explain
from nemo_spin.megatron.architecture import Architecture


def families() -> tuple[Family, ...]:
    """All families, one table each."""
    from nemo_spin.bridge.families.gemma2 import GEMMA2
    from nemo_spin.bridge.families.gemma3 import GEMMA3
    from nemo_spin.bridge.families.gpt2 import GPT2
    from nemo_spin.bridge.families.gpt_neo import GPT_NEO
    from nemo_spin.bridge.families.gpt_neox import GPT_NEOX
    from nemo_spin.bridge.families.llama import LLAMA
    from nemo_spin.bridge.families.mistral import MISTRAL
    from nemo_spin.bridge.families.mixtral import MIXTRAL
    from nemo_spin.bridge.families.olmo2 import OLMO2
    from nemo_spin.bridge.families.phi3 import PHI3
    from nemo_spin.bridge.families.qwen2 import QWEN2
    from nemo_spin.bridge.families.qwen2_moe import QWEN2_MOE
    from nemo_spin.bridge.families.qwen3 import QWEN3
    from nemo_spin.bridge.families.qwen3_moe import QWEN3_MOE

    dense = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, OLMO2, GPT2, GPT_NEOX, GPT_NEO)
    return (*dense, MIXTRAL, QWEN2_MOE, QWEN3_MOE)


def family_of(architecture: Architecture) -> Family:
    """The table that an architecture was read with."""
    return next(family for family in families() if family.name == architecture.family)


def architecture_of(hf_dir: Path) -> Architecture:
    """What the config.json of a Hugging Face directory says.

    Raises:
        CheckpointError: There is no config.json, or it describes a model that is not
            supported; the message names the property.
    """
    from nemo_spin.bridge.hf_config import read_architecture

    config, family = configuration_of(hf_dir)
    return read_architecture(Path(hf_dir), config, family)


def configuration_of(hf_dir: Path) -> tuple[dict[str, Any], Family]:
    """The config.json of a Hugging Face directory, and the family that it names.

    Raises:
        CheckpointError: There is no config.json, or it names no supported family.
    """
    from nemo_spin.bridge.hf_config import CONFIG_NAME, read_json

    if not Path(hf_dir).is_dir():
        raise CheckpointError(
            explain(
                str(hf_dir),
                found="there is no such directory",
                rule="a model is a local directory with config.json and safetensors",
                remedy="check model.path; a hub id is downloaded by the command that takes it",
            )
        )
    config = read_json(Path(hf_dir) / CONFIG_NAME)
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    for family in families():
        if name in family.architectures:
            return config, family
    supported = ", ".join(entry for family in families() for entry in family.architectures)
    raise CheckpointError(
        explain(
            f"{Path(hf_dir) / CONFIG_NAME}: architectures",
            found=repr(names),
            rule=f"supported are {supported}",
            remedy="choose a model of these families",
        )
    )
