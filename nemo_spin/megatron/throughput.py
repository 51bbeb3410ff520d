"""The columns that say how fast a step or a shard was, the same for training and scoring."""

from __future__ import annotations

import torch

from nemo_spin.config.schema import ModelConfig
from nemo_spin.data.needed_work import Needed
from nemo_spin.megatron.flops import forward_flops, peak_flops
from nemo_spin.megatron.meter import GIB, Reading
from nemo_spin.megatron.runtime import Runtime
from nemo_spin.megatron.sizes import ModelShape


class Throughput:
    """Turns needed work and a meter's reading into columns.

    Args:
        shape: The model's sizes.
        runtime: This rank's place; all ranks have the same kind of device.
        precision: `32` or `bf16`: what matrices are multiplied in, unless the model says FP8.
        model: Its packing, FP8 and adapters.
    """

    def __init__(self, shape: ModelShape, runtime: Runtime, *, precision: str, model: ModelConfig) -> None:
        self._shape = shape
        self._num_devices = runtime.world_size
        self._shares_prompts = model.packing == "shared_prompt"
        self._has_adapters = model.lora.rank is not None
        device = torch.cuda.get_device_name() if runtime.device.type == "cuda" else None
        self._peak = peak_flops(device, "fp8" if model.fp8 else precision)

    def columns(self, needed: Needed, reading: Reading, *, training: bool) -> dict[str, float | None]:
        """What was computed between two readings, and how fast.

        Returns:
            `useful_tokens`: prompts once, and responses; `packed_slots`: positions that were
            computed instead, over all replicas; `useful_share`: of the slots;
            `saved_prompt_tokens`: copies of prompts that sharing made needless;
            `tokens_per_second`: useful ones, of all devices together; `model_tflops`: needed
            10^12 operations per second of each device (`flops.forward_flops`, three times as
            many with the backward pass, fewer where weights are frozen); `peak_share`: of what
            the device can do, None where that is not known; `peak_memory_gib`: of the fullest rank
            so far. Rates are over all the time that passed, whatever it went into.
        """
        forward = forward_flops(self._shape, needed)
        trained = forward.training_adapters if self._has_adapters else forward.training
        operations = trained if training else forward.total
        rate = operations / reading.seconds / self._num_devices
        return {
            "useful_tokens": needed.tokens,
            "packed_slots": reading.slots,
            "useful_share": needed.tokens / max(reading.slots, 1),
            "saved_prompt_tokens": needed.repeated_prompt_tokens if self._shares_prompts else 0,
            "tokens_per_second": needed.tokens / reading.seconds,
            "model_tflops": rate / 1e12,
            "peak_share": None if self._peak is None else rate / self._peak,
            "peak_memory_gib": reading.peak_bytes / GIB,
        }
