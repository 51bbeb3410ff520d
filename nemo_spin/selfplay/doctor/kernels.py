"""Which layers, attention and optimizer kernels a training here uses, and why."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

from omegaconf import MISSING

from nemo_spin.config.schema import Config, ModelConfig
from nemo_spin.errors import NemoSpinError
from nemo_spin.selfplay.doctor.finding import Finding


def examine_kernels(config: Config) -> list[Finding]:
    """Asks the code that chooses them; imports PyTorch and Megatron.

    Args:
        config: Its `model.path` decides as well, where it is a directory that is there.
    """
    if any(importlib.util.find_spec(name) is None for name in ("torch", "megatron")):
        return []  # the packages' findings say so
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Megatron, that Transformer Engine and Apex are not there
        return [_layers(config), _attention(), _optimizer()]


def _layers(config: Config) -> Finding:
    import torch

    from nemo_spin.bridge.families import architecture_of
    from nemo_spin.megatron.compat import has_transformer_engine
    from nemo_spin.megatron.provider import uses_transformer_engine

    model = config.model
    params_dtype = torch.float32 if str(config.trainer.precision) == "32" else torch.bfloat16
    has_engine = has_transformer_engine()
    if model.path == MISSING or not Path(model.path).expanduser().is_dir():
        usable = torch.cuda.is_available() and has_engine and model.transformer_impl != "local"
        usable = usable and (params_dtype != torch.float32 or model.transformer_impl == "transformer_engine")
        why = "for families that it can express" if usable else _without_engine(has_engine, model)
        return Finding("layers", f"{'Transformer Engine' if usable else 'Megatron local spec'}: {why}")
    try:
        architecture = architecture_of(Path(model.path).expanduser())
        engine = uses_transformer_engine(model.transformer_impl, architecture, params_dtype=params_dtype)
    except NemoSpinError as error:
        return Finding(
            "layers", str(error).splitlines()[0], "error", "nemo-spin doctor --model PATH says more"
        )
    if engine:
        return Finding("layers", "Transformer Engine: it is installed and the model's layers are made of it")
    obstacle = architecture.without_transformer_engine
    why = f"the model has {obstacle}" if obstacle else _without_engine(has_engine, model)
    return Finding("layers", f"Megatron local spec: {why}")


def _without_engine(has_engine: bool, model: ModelConfig) -> str:
    import torch

    if model.transformer_impl == "local":
        return "model.transformer_impl=local asks for it"
    if not torch.cuda.is_available():
        return "there is no GPU"
    return "its products are not float32's" if has_engine else "Transformer Engine is not installed"


def _attention() -> Finding:
    import torch

    from nemo_spin.megatron.attention_kernels import kernel_for
    from nemo_spin.megatron.compat import varlen_attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kernel_for(torch.empty(1, 1, 64, dtype=torch.bfloat16, device=device)) is not None:
        return Finding("attention", "one call for all segments of a row (PyTorch's variable-length kernel)")
    why = "there is no GPU"
    if device.type == "cuda":
        why = (
            "the GPU is older than Ampere"
            if varlen_attention()
            else f"torch {torch.__version__} is before 2.11"
        )
    return Finding("attention", f"scaled_dot_product_attention, a segment at a time: {why}")


def _optimizer() -> Finding:
    from nemo_spin.megatron.optimizers import adam_package

    names = {
        "transformer_engine": "Transformer Engine's fused one",
        "apex": "Apex's fused one",
        "torch": "PyTorch's AdamW: neither Transformer Engine nor Apex is installed",
    }
    package = adam_package()
    return Finding("Adam", names.get(package, package))
