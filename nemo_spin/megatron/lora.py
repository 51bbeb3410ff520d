"""Low-rank adapters (LoRA, arXiv 2106.09685) beside Megatron's column- and row-parallel linears.

y = W x + (alpha / r) B A x with W frozen: A is drawn, B starts as 0, so that the policy starts as its
opponent exactly. Megatron fuses query, key and value into one linear, and gate and up into another.
Here each projection of the Hugging Face model keeps an adapter of its own, and the outputs are put
where the fused linear has theirs: an adapter leaves as `peft` knows it, without approximation.

What a tensor-parallel rank holds, and what travels (r numbers for each token, never a hidden size):

                 A [r, in]       B [out, r]      A x
    column       whole           its outputs     the same on all ranks; its gradient is summed over them
    row          its inputs      whole           a partial sum, reduced

Under sequence parallelism A x is gathered (column) or reduced and scattered (row) over the tokens, and
the gradients of what is whole come from a rank's own tokens: such parameters are marked
`sequence_parallel`, and Megatron sums their gradients over the ranks as it does those of norms.

Dropout acts on the input of A and is drawn once for the projections of one linear. Where all ranks
have the same input they draw the same mask (PyTorch's default state, which Megatron keeps equal over
tensor-parallel ranks), where each has its own part they draw their own (Megatron's tensor-parallel
state). `seed_dropout` makes the draws of a step depend on its number, so that a resumed training goes
on as if it had never stopped.

Adapters are children of the linears, named `lora`, and act through forward hooks: the linears are
Megatron's (or Transformer Engine's) own, and the base parameters keep their names and places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from nemo_spin.config.lora_rules import targets_of
from nemo_spin.config.schema import LoraConfig
from nemo_spin.megatron.lora_layers import (
    COLUMN_PARALLEL,
    Adapter,
    Adapters,
    ColumnAdapters,
    RowAdapters,
    normalised_input,
)
from nemo_spin.megatron.projections import PROJECTIONS
from nemo_spin.megatron.runtime import Runtime


def attach(chunks: Sequence[Any], lora: LoraConfig, *, runtime: Runtime, seed: str) -> None:
    """Freezes the model and gives the chosen linears adapters. Before the model is wrapped for training.

    Args:
        chunks: GPTModels with their weights.
        lora: Rank, scale, dropout and targets.
        runtime: This rank's place.
        seed: Decides A, together with the place of the adapter in the whole model; how the model is
            split over ranks does not matter.
    """
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.requires_grad_(False)
        if getattr(chunk, "embedding", None) is not None:
            chunk.embedding.register_forward_hook(_require_gradient)
        targets = targets_of(lora, gated=chunk.config.gated_linear_unit)
        for layer in chunk.decoder.layers:
            for linear, projections in PROJECTIONS.items():
                chosen = [name for name in projections if name in targets]
                if chosen:
                    place = (layer.layer_number - 1, linear)
                    module = layer.get_submodule(linear)
                    module.lora = _adapters(
                        module, chosen, chunk.config, place=place, lora=lora, runtime=runtime, seed=seed
                    )
                    module.lora.hook = module.register_forward_hook(_add)


def _require_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Lets gradients pass a stage whose own parameters are frozen.

    Recomputation differentiates a layer only if its input asks for it.
    """
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


def _add(linear: Any, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """Forward hook of a linear: adds what its adapters say."""
    return output[0] + linear.lora(normalised_input(linear, args[0])), output[1]


def _adapters(
    linear: Any,
    names: list[str],
    config: Any,
    *,
    place: tuple[int, str],
    lora: LoraConfig,
    runtime: Runtime,
    seed: str,
) -> Adapters:
    """The adapters of one linear, with all attributes that Megatron asks for."""
    is_column = place[1] in COLUMN_PARALLEL
    made: dict[str, Adapter] = {}
    widths, groups = _output_widths(linear, config, place[1], runtime) if is_column else ({}, 1)
    for name in names:
        out = groups * widths[name] if is_column else linear.weight.shape[0]
        columns = linear.weight.shape[1] * (1 if is_column else runtime.tp_size)
        a = initial_a(f"{seed}/{place[0]}/{name}", rank=lora.rank or 0, columns=columns)
        if not is_column:
            a = a.chunk(runtime.tp_size, dim=1)[runtime.tp_rank]
        made[name] = adapter = Adapter(
            a.to(linear.weight.device, linear.weight.dtype, copy=True).contiguous(),
            linear.weight.new_zeros(out, lora.rank or 0),
        )
        split, whole = (adapter.b, adapter.a) if is_column else (adapter.a, adapter.b)
        set_tensor_model_parallel_attributes(split, True, 0 if is_column else 1, 1)
        whole.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    kind = ColumnAdapters if is_column else RowAdapters
    adapters = kind(made, place=place, lora=lora, runtime=runtime)
    adapters.sequence_parallel = config.sequence_parallel
    if isinstance(adapters, ColumnAdapters):
        adapters.widths, adapters.groups = widths, groups
    return adapters


def _output_widths(linear: Any, config: Any, name: str, runtime: Runtime) -> tuple[dict[str, int], int]:
    """Of a column-parallel linear: see `ColumnAdapters`."""
    if name == "self_attention.linear_qkv":
        heads = config.num_attention_heads // config.num_query_groups
        widths = (heads * config.kv_channels, config.kv_channels, config.kv_channels)
        return dict(zip(PROJECTIONS[name], widths, strict=True)), config.num_query_groups // runtime.tp_size
    rows = linear.weight.shape[0]
    if config.gated_linear_unit:
        return {"gate_proj": rows // 2, "up_proj": rows // 2}, 1
    return {"up_proj": rows}, 1


def _generator(seed: str) -> torch.Generator:
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    return torch.Generator("cpu").manual_seed(number)


def initial_a(seed: str, *, rank: int, columns: int) -> Tensor:
    """[r, in] float32 on the CPU, drawn as `peft` does.

    Its Kaiming initialisation with a = sqrt(5) is uniform within 1 / sqrt(in).
    """
    drawn = torch.rand(rank, columns, generator=_generator(seed), dtype=torch.float32, device="cpu")
    return (2 * drawn - 1) / columns**0.5


def seed_dropout(runtime: Runtime, seed: str) -> None:
    """Starts the random states that dropout draws from; every pipeline stage and replica has its own.

    Args:
        runtime: This rank's place.
        seed: Such as one for each optimizer step.
    """
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    generator = _generator(f"{seed}/{runtime.pp_rank}/{replica}")
    number = int(torch.randint(2**31 - 2**16, (), generator=generator))
    torch.manual_seed(number)
    tensor_parallel.model_parallel_cuda_manual_seed(number)


def all_adapters(chunks: Sequence[nn.Module]) -> Iterator[Adapters]:
    """The adapters of this rank, in the model's order; chunks may be wrapped."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, Adapters):
                yield module


def is_adapter(name: str) -> bool:
    """Whether a parameter of a model, by its name, belongs to an adapter."""
    return ".lora." in name


@torch.no_grad()
def merge(chunks: Sequence[nn.Module]) -> float:
    """Adds the adapters to the weights and removes them. All ranks must call.

    The sum is formed in float32 and rounded to the weights' type once.

    Returns:
        What rounding did to the update: the norm of (weights after - weights before - update) over
        that of the update, over all ranks. 0.0 where the update is 0. Near 1 the weights' type is too
        coarse for so small an update.
    """
    lost, wanted = 0.0, 0.0
    for chunk in chunks:
        for linear in list(chunk.modules()):
            adapters = getattr(linear, "lora", None)
            if not isinstance(adapters, Adapters):
                continue
            weight: Any = linear.weight
            update = adapters.update()
            before = weight.float()
            rounded = (before + update).to(weight.dtype)
            lost += float((rounded.float() - before - update).double().square().sum())
            wanted += float(update.double().square().sum())
            weight.copy_(rounded)
            adapters.hook.remove()
            del linear.lora
    sums = torch.tensor([lost, wanted], dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(sums)
    return float((sums[0] / sums[1]).sqrt()) if sums[1] else 0.0
