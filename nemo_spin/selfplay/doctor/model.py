"""What `nemo-spin doctor` finds out, in lines for the screen; reads configuration and headers only."""

from __future__ import annotations

from pathlib import Path

from nemo_spin.bridge.checkpoint_files import num_parameters, open_model
from nemo_spin.bridge.families import architecture_of, configuration_of
from nemo_spin.bridge.families.table import Family
from nemo_spin.bridge.hf_config import read_architecture
from nemo_spin.errors import CheckpointError
from nemo_spin.generation.families import missing_in_vllm
from nemo_spin.megatron.architecture import Architecture

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth")


def examine_model(model_dir: Path) -> list[str]:
    """What a supported model is like.

    Names and shapes of weights are checked against the configuration where weights are there.

    Raises:
        CheckpointError: It is not supported; the message names every property for which it is not.
    """
    config, family = configuration_of(model_dir)
    refused = _refused_properties(model_dir, config, family)
    if refused:
        raise CheckpointError("\n".join([f"{model_dir} is not supported:", *map(str, refused)]))
    architecture = architecture_of(model_dir)
    facts = {
        "model": str(model_dir),
        **_described(architecture),
        "weights": _weights(model_dir, architecture),
    }
    return [f"{name:12}{text}" for name, text in facts.items() if text] + ["supported"]


def _refused_properties(model_dir: Path, config: dict[str, object], family: Family) -> list[CheckpointError]:
    """All of them: each one found is taken out of the configuration, and the rest is read again."""
    refused: list[CheckpointError] = []
    rest = dict(config)
    while True:
        try:
            read_architecture(model_dir, rest, family)
        except CheckpointError as error:
            refused.append(error)
            key = (error.key or "").split(".")[0]
            removed = {key, family.keys.get(key, key)} & rest.keys()
            if not removed:
                return refused
            rest = {name: value for name, value in rest.items() if name not in removed}
        else:
            return refused


def _described(model: Architecture) -> dict[str, str]:
    windows = [window for window in model.windows if window is not None]
    properties = {
        f"windows of {max(windows, default=0)} tokens in {len(windows)} layers": bool(windows),
        f"attention scores capped at {model.attention_logit_cap}": model.attention_logit_cap is not None,
        f"logits capped at {model.logit_cap}": model.logit_cap is not None,
        "learned positions": model.learned_positions,
        f"{model.rope.kind} rotary embedding": not model.learned_positions and model.rope.kind != "default",
        "tied embeddings": model.tie_word_embeddings,
    }
    limit, unsampled = model.longest_sequence, missing_in_vllm(model)
    return {
        "family": f"{model.family} ({model.hf_architecture}), {model.num_layers} layers of "
        f"{model.hidden_size}, {model.num_attention_heads} heads in {model.num_query_groups} groups, "
        f"{model.vocab_size} tokens",
        "properties": ", ".join(name for name, has_it in properties.items() if has_it),
        "layers": f"Megatron's local ones, for {model.without_transformer_engine}"
        if model.without_transformer_engine
        else "",
        "limit": f"sequences of {limit[0]} tokens: {limit[1]}" if limit else "",
        "sampler": f"{unsampled}: no generate and evaluate" if unsampled else "",
    }


def _weights(model_dir: Path, architecture: Architecture) -> str:
    if not any(next(model_dir.glob(pattern), None) for pattern in _WEIGHTS):
        return "none here: config.json alone was checked"
    checkpoint = open_model(model_dir, architecture)
    files = {tensor.file for tensor in checkpoint.tensors.values()}
    dtypes = sorted({tensor.dtype for tensor in checkpoint.tensors.values()})
    return (
        f"{num_parameters(model_dir) / 1e9:.3g} billion in {len(files)} files ({', '.join(dtypes)}), "
        "with the names and shapes that config.json calls for"
    )
