"""Adapters in vLLM: the model they belong to is loaded once, and each takes the place of the last.

vLLM takes an adapter with a request (`LoRARequest`), reads its directory at the first one, and keeps
apart what the prefix cache holds of different ones by their numbers.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from nemo_spin.generation.request import EngineSettings

# What an engine can be made ready for; `max_lora_rank` of vLLM's LoRAConfig takes no others.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_MODULES = "lora_target_modules"


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """What makes a `vllm.LLM` take adapters; nothing where it needs to take none.

    Left to itself vLLM prepares the head for adapters too, and then fails on the log-probabilities
    of prompts (0.32 on CPU), which the canary asks for.
    """
    if not settings.max_adapter_rank:
        return {}
    from vllm.engine.arg_utils import EngineArgs

    arguments: dict[str, Any] = {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": next(rank for rank in _RANKS if rank >= settings.max_adapter_rank),
    }
    if any(field.name == _MODULES for field in fields(EngineArgs)):  # not in older versions
        arguments[_MODULES] = list(settings.adapter_modules)
    return arguments


def request_of(adapter_dir: str | None, number: int) -> Any:
    """What is handed to vLLM with every prompt; None for the model without adapters.

    Args:
        adapter_dir: Directory as `peft` writes it.
        number: No other adapter of the engine's life has had it.
    """
    if adapter_dir is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"adapter-{number}", number, adapter_dir)
