"""Optimizer state in a resume checkpoint: one format, whoever shards it.

Megatron stores the state of its three optimizer wrappers in three formats, and that of the
distributed optimizer for Adam alone, gathered on every rank. Here each state tensor of a
parameter is stored under the parameter's own name and global shape, whatever the optimizer
calls it; a rank that holds a slice of the flattened parameter stores the boxes which that
slice covers. Nothing is gathered or copied, and a checkpoint of one layout, sharded or not,
is read at any other.

Hyperparameters are not stored: they are those of the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer

_MAIN_WEIGHT = "fp32_param"
_MOMENTS: dict[type, tuple[str, ...]] = {torch.optim.RMSprop: ("square_avg",)}
_ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP_IN_STATE = (torch.optim.RMSprop, torch.optim.Adam)  # AdamW is an Adam; fused ones count in the group


@dataclass(frozen=True)
class _Held:
    """What this rank's optimizer holds of one parameter.

    Attributes:
        model_param: The parameter, as the model's checkpoint names it.
        inner_param: What the inner optimizer steps: it, its float32 copy, or a slice of one of them.
        start: Where the slice begins in the flattened parameter; 0 for a whole one.
    """

    model_param: torch.nn.Parameter
    inner_param: torch.Tensor
    start: int


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The wrappers that a chained optimizer consists of and that have something to step."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def num_updates(optimizer: MegatronOptimizer) -> int:
    """Optimizer steps that the state has seen."""
    return max((_steps_of(part.optimizer) for part in optimizer_parts(optimizer)), default=0)


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, with_main_weights: bool = True
) -> dict[str, list[ShardedTensor]]:
    """The state as tensors that `dist_checkpointing` saves, or loads in place. All ranks must call.

    Args:
        optimizer: Its state is made (of zeros) where there is none yet.
        model_state: Sharded state of the model's chunks, which names and places the parameters.
        with_main_weights: Whether float32 copies of parameters are part of it.

    Returns:
        Keys -> this rank's boxes of the tensor with that key; their data are the state's own.
    """
    tensors, _ = extract_sharded_tensors_and_factories(model_state)
    placed = {id(sharded.data): sharded for sharded in nested_values(tensors)}
    state: dict[str, list[ShardedTensor]] = {}
    for part in optimizer_parts(optimizer):
        _make_state(part)
        shards = isinstance(part, DistributedOptimizer)
        for held in _held_by(part):
            for name, values in _values(part.optimizer, held).items():
                if name == _MAIN_WEIGHT and not with_main_weights:
                    continue
                for box in _boxes(placed[id(held.model_param)], values, held.start, shards=shards):
                    box.key = f"optimizer.state.{name}.{box.key}"
                    state.setdefault(box.key, []).append(box)
    return state


def take_loaded(optimizer: MegatronOptimizer, *, updates: int) -> None:
    """After `dist_checkpointing` filled the state: sets what is no tensor of a parameter's shape.

    Args:
        optimizer: Whose `sharded_optimizer_state` was loaded.
        updates: Optimizer steps that the loaded state has seen (Adam corrects its bias by it).
    """
    for part in optimizer_parts(optimizer):
        inner = part.optimizer
        if isinstance(inner, HybridDeviceOptimizer):
            for sub in inner.sub_optimizers:
                _set_steps(sub, updates)
            inner._sync_hdo_state_to_sub_optimizers()
        else:
            _set_steps(inner, updates)


def _held_by(part: Any) -> Iterator[_Held]:
    if isinstance(part, DistributedOptimizer):
        for buffer in part.gbuf_ranges:
            for buckets in buffer.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        group, order = part.model_param_group_index_map[parameter]
                        inner = part.optimizer.param_groups[group]["params"][order]
                        yield _Held(parameter, inner, ranges["param"].start)
        return
    copies: dict[int, torch.nn.Parameter] = {}
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            copies |= {id(main): model for model, main in zip(models, mains, strict=True)}
    for parameters in part.optimizer.param_groups:
        for inner in parameters["params"]:
            yield _Held(copies.get(id(inner), inner), inner, 0)


def _values(inner: torch.optim.Optimizer, held: _Held) -> dict[str, torch.Tensor]:
    """State tensors of the shape of what is stepped, and the float32 main weight where there is one."""
    state = inner.state[held.inner_param]
    values = {
        _MAIN_WEIGHT if name == "master_param" else name: value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.shape == held.inner_param.shape
    }
    if held.inner_param.dtype != held.model_param.dtype:
        values[_MAIN_WEIGHT] = held.inner_param
    return {name: value.detach() for name, value in values.items()}


def _boxes(
    placed: ShardedTensor | ShardedTensorFactory, values: torch.Tensor, start: int, *, shards: bool
) -> Iterator[ShardedTensor]:
    """`values`, which belong at `start` of the flattened parameter, as boxes of its global tensor.

    A parameter whose halves lie apart in the global tensor (gate and up projection) has a
    factory; each half is a block of rows.
    """
    is_factory = isinstance(placed, ShardedTensorFactory)
    blocks = list(nested_values(placed.build())) if is_factory else [placed]
    flat, stop = values.reshape(-1), start + values.numel()
    first = placed.data.data_ptr()
    for block in blocks:
        assert block.data.is_contiguous(), f"{block.key} is no block of rows of its parameter"
        begin = (block.data.data_ptr() - first) // block.data.element_size()
        low, high = max(begin, start), min(begin + block.data.numel(), stop)
        if low >= high:
            continue
        taken = low - start
        for corner, sizes in _rectangles(block.local_shape, low - begin, high - begin):
            size = math.prod(sizes)
            yield _box(block, flat[taken : taken + size], corner, sizes, shards=shards)
            taken += size


def _box(
    block: ShardedTensor, data: torch.Tensor, corner: Sequence[int], sizes: Sequence[int], *, shards: bool
) -> ShardedTensor:
    ahead = block.prepend_axis_num
    shape = (*(1 for _ in range(ahead)), *sizes)
    corner = (*(0 for _ in range(ahead)), *corner)
    return replace(
        block,
        data=data.view(shape),
        dtype=data.dtype,
        local_shape=shape,
        global_offset=tuple(map(sum, zip(block.global_offset, corner, strict=True))),
        axis_fragmentations=None,  # boxes of different sizes are no grid
        prepend_axis_num=0,
        # each data-parallel rank has slices of its own: none is a copy of another's
        replica_id=(*block.replica_id[:2], 0) if shards else block.replica_id,
    )


def _rectangles(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The elements `start` to `stop` of an array, counted row by row, as boxes in that order.

    Yields:
        Corner and sizes of each box; at most two for each axis but the last, and one more.
    """
    if len(shape) <= 1:
        yield (start,), (stop - start,)
        return
    row_size = math.prod(shape[1:])
    while start < stop:
        row, column = divmod(start, row_size)
        rows = (stop - start) // row_size if column == 0 else 0
        if rows:
            yield (row, *(0 for _ in shape[1:])), (rows, *shape[1:])
            start += rows * row_size
            continue
        end = min(stop, (row + 1) * row_size)
        for corner, sizes in _rectangles(shape[1:], column, end - row * row_size):
            yield (row, *corner), (1, *sizes)
        start = end


def _make_state(part: Any) -> None:
    """Gives every parameter the tensors that a checkpoint is loaded into."""
    inner = part.optimizer
    if inner.state:
        return
    if isinstance(inner, HybridDeviceOptimizer):
        _step_without_effect(inner)
        return
    if not isinstance(inner, _STEP_IN_STATE):
        part.init_state_fn(inner, part.config)  # a fused Adam knows how its states look
        return
    names = _MOMENTS.get(type(inner), _ADAM_MOMENTS)
    for group in inner.param_groups:
        for parameter in group["params"]:
            inner.state[parameter] = {name: torch.zeros_like(parameter.data) for name in names}
    _set_steps(inner, 0)


def _step_without_effect(inner: HybridDeviceOptimizer) -> None:
    """Megatron makes an offloaded state in a step; at a learning rate of 0 it changes no weight."""
    rates = [group["lr"] for group in inner.param_groups]
    for group in inner.param_groups:
        group["lr"] = 0.0
    inner.dummy_step()
    for group, rate in zip(inner.param_groups, rates, strict=True):
        group["lr"] = rate


def _steps_of(inner: torch.optim.Optimizer) -> int:
    if isinstance(inner, HybridDeviceOptimizer):
        return max((_steps_of(sub) for sub in inner.sub_optimizers), default=0)
    for state in inner.state.values():
        if "step" in state:
            return int(state["step"])
    return max((int(group.get("step", 0)) for group in inner.param_groups), default=0)


def _set_steps(inner: torch.optim.Optimizer, updates: int) -> None:
    if isinstance(inner, _STEP_IN_STATE):
        for state in inner.state.values():
            state["step"] = torch.tensor(float(updates), dtype=torch.float32)
    else:
        for group in inner.param_groups:
            group["step"] = updates
