"""Megatron-Core on machines without a GPU.

Megatron-Core addresses CUDA by name: it asks for the current device, creates tensors
with `device="cuda"`, keeps CUDA random states and checks type names such as
`torch.cuda.FloatTensor`. Nothing in its model, its schedules, its optimizers or its
checkpoints needs a GPU beyond that. `install()` answers those questions with the CPU,
so that the same code runs in gloo processes; it is called where no GPU is found and
nowhere else. Deleting this file (and its one call in `runtime.py`) removes the CPU
backend without a trace.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc
_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


def _names_cuda(device: Any) -> bool:
    """Whether `device` means a GPU: "cuda", "cuda:1", a device object or an index."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class _CudaMeansCpu(TorchFunctionMode):
    """Turns every request for a CUDA tensor into one for a CPU tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _TYPE_NAMES.get(args[0].dtype) or func(*args)
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


class _Stream:
    """A CUDA stream that orders nothing, because CPU operators return when they are done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Does nothing."""

    def synchronize(self) -> None:
        """Does nothing."""

    def record_event(self) -> _Stream:
        """An event that has happened; waiting for it is `synchronize`."""
        return self


def _ignored() -> Callable[..., None]:
    """A new function that does nothing: torch.compile wants every name of torch to be its own."""
    return lambda *args, **kwargs: None


_installed: list[TorchFunctionMode] = []


def install() -> None:
    """Makes `torch.cuda` mean the CPU in this process, once and for its lifetime."""
    if _installed:
        return
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.tensor_parallel import random as megatron_random

    from nemo_spin.megatron.rotation import rotate

    choose_vector_kernels()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = _ignored()
    cuda.set_device = _ignored()
    cuda.empty_cache = _ignored()
    cuda.Stream = _Stream
    cuda.current_stream = lambda *args: _Stream()
    cuda.default_stream = lambda *args: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    rng: Any = megatron_random
    rng._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    rope_utils.fused_apply_rotary_pos_emb = rotate
    _hand_over_split_sizes()
    mode = _CudaMeansCpu()
    mode.__enter__()
    _installed.append(mode)


def choose_vector_kernels() -> None:
    """Has MKL choose its vector functions on this thread, before several threads call one at once.

    Where several threads together make the first call in a process (rotary embeddings' `cos`, say), one of
    them now and then gets kernels of low accuracy, for that call alone: off by up to 1.5e-4, in 12 of 2,000
    processes with eight threads, and in none after this.
    """
    torch.zeros(1).cos()


def keep_freed_memory() -> None:
    """Has the C library keep what is freed from here on, for what is asked for next.

    glibc maps blocks of up to 32 MB and more for themselves and gives them back at once, so that every
    activation of a longer row is made of new pages, each of which the kernel has to find and clear: a
    quarter of a step with rows of 8,192 tokens. Other C libraries are left as they are.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)


def _hand_over_split_sizes() -> None:
    """Gives exchanges of tokens between experts their sizes as numbers.

    Megatron turns tensors into arrays when it moves them off the GPU, and leaves alone what is
    not there; torch.distributed takes no tensors for sizes.
    """
    from megatron.core.transformer.moe import token_dispatcher

    def off_the_gpu(value: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return value.numpy() if as_numpy and isinstance(value, torch.Tensor) else value

    dispatcher: Any = token_dispatcher
    dispatcher.maybe_move_tensor_to_cpu = off_the_gpu
