"""What differs between the releases of Megatron-Core and PyTorch that are supported, and nothing else.

Megatron-Core 0.16.1 (the last for Python 3.11) to 0.19 (Python 3.12), PyTorch from 2.6. Code
elsewhere is written against what these have in common. A function here says which release
wants what, and goes when that release is no longer supported.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing


@functools.cache
def varlen_attention() -> Callable[..., Any] | None:
    """PyTorch's variable-length attention, causal from the bottom right; None before torch 2.11.

    torch 2.10 has it without a softmax scale. torch 2.11 takes fewer key heads than query
    heads as they come, later releases want to be told.
    """
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    attend: Callable[..., Any] = varlen.varlen_attn
    parameters = inspect.signature(attend).parameters
    if "window_size" not in parameters:
        return None
    grouped = {"enable_gqa": True} if "enable_gqa" in parameters else {}
    return functools.partial(attend, window_size=(-1, 0), **grouped)


def has_transformer_engine() -> bool:
    """Whether Megatron can use Transformer Engine: the package may be there without its PyTorch part."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def complete_router() -> None:
    """Makes routing to experts work without Transformer Engine.

    Megatron-Core 0.16.1 looks at a name that its module has with Transformer Engine alone.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def mlp_submodules(mlp: Any) -> Any:
    """The linear layers that a layer's spec names for its dense MLP.

    Megatron-Core 0.16 has them in a ModuleSpec, 0.19 among the arguments of a partial.
    """
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules


def save_asynchronously(state: dict[str, Any], directory: Path) -> Any:
    """Prepares a distributed checkpoint; Megatron's AsyncRequest writes it. All ranks must call.

    Megatron-Core 0.16 has one way of writing. 0.19 takes by default one of a package that is
    rarely there (nvidia-resiliency-ext); its own is asked for by name.
    """
    named = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    way = {"async_strategy": "mcore"} if named else {}
    return dist_checkpointing.save(state, str(directory), ("torch_dist", 1), async_sharded_save=True, **way)


@contextmanager
def norms_are_built(config: Any, has_norms: bool) -> Iterator[None]:
    """Makes attention take the norms of queries and keys that its spec names.

    Megatron-Core 0.19 refuses them unless the configuration has `qk_layernorm`, which afterwards
    also sums their gradients over tensor-parallel ranks: wrong for `HeadsNorm`, whose ranks hold
    other weights each. So it is set only while a model is built; 0.16 looks at the spec alone.

    Args:
        config: Megatron's TransformerConfig.
        has_norms: Whether the spec names some of ours.
    """
    before = config.qk_layernorm
    config.qk_layernorm = before or has_norms
    try:
        yield
    finally:
        config.qk_layernorm = before
