"""What can be known to be wrong before anything is started.

A missing directory, a truncated checkpoint or parallel sizes that do not divide the
model are reported in the first seconds, not after hours of tokenizing or sampling.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from nemo_spin.bridge.checkpoint_files import check_checkpoint, open_checkpoint
from nemo_spin.bridge.companions import TOKENIZER_FILES
from nemo_spin.bridge.hf_config import CONFIG_NAME
from nemo_spin.bridge.peft_files import projection_names
from nemo_spin.config.expert_rules import check_experts_fit
from nemo_spin.config.fp8_rules import check_fp8_fits
from nemo_spin.config.iterations import config_at
from nemo_spin.config.lora_rules import experts_have_no_adapters, gate_is_there
from nemo_spin.config.mistakes import raise_together
from nemo_spin.config.schema import Config
from nemo_spin.config.validate import check_model_fits
from nemo_spin.errors import CheckpointError, explain
from nemo_spin.megatron.architecture import Architecture

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


def find_model(path: str) -> Path:
    """The local directory of `model.path`; a hub id is downloaded into the hub's cache.

    A whole model that is in the cache already is used as it is, so that a run goes on from
    the same weights when the hub has moved on.

    Raises:
        CheckpointError: There is no such directory, and no such model on the hub.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory.resolve()
    if not _HUB_ID.fullmatch(path) or directory.exists():
        raise CheckpointError(
            explain(
                f"model.path={path}",
                found="is a file" if directory.exists() else "there is no such directory",
                rule="a Hugging Face model directory, or a hub id (organisation/name)",
                remedy="check the path; relative ones start at the current directory",
            )
        )
    return _download(path)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError):
        cached = Path(snapshot_download(hub_id, allow_patterns=_WANTED, local_files_only=True)).resolve()
        if _missing_part(cached) is None:
            return cached
    try:
        fetched = Path(snapshot_download(hub_id, allow_patterns=_WANTED)).resolve()
    except Exception as error:  # the hub client raises dozens of types: network, rights, names
        raise CheckpointError(
            explain(
                f"model.path={hub_id}",
                found=f"could not be downloaded ({str(error).splitlines()[0] if str(error) else error!r})",
                rule="a local directory, or a hub id that this machine can reach",
                remedy="check the name, the network and `hf auth login`, or give a directory",
            )
        ) from error
    missing = _missing_part(fetched)
    if missing is None:
        return fetched
    raise CheckpointError(  # the client falls back on a part in its cache where the hub does not answer
        explain(
            f"model.path={hub_id}",
            found=f"there is no {missing} on the hub, or in its cache where the hub does not answer",
            rule=f"{CONFIG_NAME}, a tokenizer and whole weights in safetensors files",
            remedy="check the network and the model's page; where it has .bin files alone, download them and "
            "give the directory: its refusal says how to convert them",
        )
    )


def _missing_part(snapshot: Path) -> str | None:
    """What a model needs and a cache lacks, such as where the tokenizer alone was ever loaded."""
    if not (snapshot / CONFIG_NAME).is_file():
        return CONFIG_NAME
    if not any((snapshot / name).is_file() for name in TOKENIZER_FILES):
        return "tokenizer"
    try:
        open_checkpoint(snapshot)
    except CheckpointError:
        return "whole set of weights"
    return None


def check_model(config: Config, model_dir: Path) -> None:
    """Checks that the model is complete, supported, and can be split as configured.

    Reads configuration files and headers only; values are checked before sampling.

    Raises:
        CheckpointError: The directory is no complete, supported model, or its adapters cannot be exported.
        ConfigError: A parallel size does not divide it, or adapters are asked for beside layers
            that can have none.
    """
    architecture = check_checkpoint(model_dir, finite=False)
    for changed in [config, *(config_at(config, int(number)) for number in config.spin.per_iteration)]:
        _check_fits(changed, architecture)


def _check_fits(config: Config, architecture: Architecture) -> None:
    has_experts = architecture.num_experts > 0
    mlp_width = architecture.shared_expert_ffn_hidden_size if has_experts else architecture.ffn_hidden_size
    check_experts_fit(config, num_experts=architecture.num_experts)
    raise_together(
        gate_is_there(config, gated=architecture.gated)
        + experts_have_no_adapters(config, num_experts=architecture.num_experts)
    )
    if config.model.lora.export_adapter:
        projection_names(architecture, config.model.lora)
    check_model_fits(
        config,
        num_layers=architecture.num_layers,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        ffn_hidden_size=mlp_width,
        vocab_size=architecture.vocab_size,
        longest_sequence=architecture.longest_sequence,
    )
    check_fp8_fits(
        config,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        head_dim=architecture.head_dim,
    )
