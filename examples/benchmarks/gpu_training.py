"""Measures training steps of one model with random weights: `MODEL LAYERS LENGTH...`, a JSON line for each.

A row of a length is one unit: a prompt of half of it and two responses of a quarter each.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from nemo_spin.config.schema import ModelConfig, OptimConfig
from nemo_spin.data.datasets import Units
from nemo_spin.data.packing import Layout
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.megatron.costs import unit_flops
from nemo_spin.megatron.engine import Engine
from nemo_spin.megatron.forward_step import SPIN_SUMS, spin_loss
from nemo_spin.megatron.sizes import Work, shape_of
from nemo_spin.objective.objective import build_objective

STEP_TOKENS = 16384  # of a step, unless one row is longer
TIMED = 3  # steps, after one that warms up
_LEAST_ROW = 64
_BYTES_A_WEIGHT = 18  # bf16 weight, and float32: gradient, main weight, Adam's two moments


def _llama(layers: int, width: int, mlp: int, heads: int, groups: int, **others: Any) -> Architecture:
    settings = {"head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False, **others}
    return Architecture(
        family="llama",
        hf_architecture="LlamaForCausalLM",
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=mlp,
        num_attention_heads=heads,
        num_query_groups=groups,
        max_position_embeddings=131072,
        norm_epsilon=1e-5,
        **settings,
    )


# The shapes of Qwen2.5 0.5B (without its biases) and of Llama 3.2 1B and 3B and Llama 3.1 8B.
MODELS = {
    "tiny": _llama(2, 64, 128, 4, 2, head_dim=16, vocab_size=300),
    "0.5B": _llama(24, 896, 4864, 14, 2, head_dim=64, vocab_size=151936, tie_word_embeddings=True),
    "1B": _llama(16, 2048, 8192, 32, 8, head_dim=64, tie_word_embeddings=True),
    "3B": _llama(28, 3072, 8192, 24, 8, tie_word_embeddings=True),
    "8B": _llama(32, 4096, 14336, 32, 8),
}


def main(name: str, transformer_impl: str, lengths: list[int]) -> None:
    """Builds the model, with fewer layers where memory is short, and measures each length."""
    engine = None
    for share in (1.0, 0.75, 0.5, 0.375, 0.25):
        layers = int(MODELS[name].num_layers * share)
        architecture = replace(MODELS[name], num_layers=layers)
        if _state_bytes(architecture) > _free_bytes():
            continue
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            engine = _trained(architecture, transformer_impl)
        if engine is not None:
            break
        forget()
    if engine is None:
        raise SystemExit("a quarter of the model does not fit into memory")
    note = "" if share == 1.0 else f"{layers} of {MODELS[name].num_layers} layers"
    for length in lengths:
        print(json.dumps({"row": length, **_measured(engine, architecture, length, note)}), flush=True)


def _state_bytes(architecture: Architecture) -> int:
    """Of weights, gradients, main weights and moments; norms are left out."""
    a = architecture
    attention = 2 * a.hidden_size * a.head_dim * (a.num_attention_heads + a.num_query_groups)
    layers = a.num_layers * (attention + 3 * a.hidden_size * a.ffn_hidden_size)
    ends = a.vocab_size * a.hidden_size * (1 if a.tie_word_embeddings else 2)
    return _BYTES_A_WEIGHT * (layers + ends)


def _free_bytes() -> float:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else math.inf


def _trained(architecture: Architecture, transformer_impl: str) -> Engine:
    """An engine after a short step, which is when Adam's moments take their memory."""
    engine = _engine(architecture, transformer_impl)
    _recompute(engine, "full")
    engine.layout = replace(engine.layout, micro_batch_tokens=_LEAST_ROW)
    quarter = _LEAST_ROW // 4
    _step(engine, _units(architecture.vocab_size, 2 * quarter, quarter, 1))
    return engine


def _engine(architecture: Architecture, transformer_impl: str) -> Engine:
    from nemo_spin.megatron.optimizers import build_optimizer, wrap_for_training
    from nemo_spin.megatron.provider import build_model
    from nemo_spin.megatron.runtime import initialize

    runtime = initialize(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=1)
    model = ModelConfig(transformer_impl=transformer_impl, optim=OptimConfig(name="adam"))
    chunks = build_model(architecture, model, params_dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    wrapped = wrap_for_training(chunks, distributed_optimizer=False)
    optimizer = build_optimizer(wrapped, model.optim, lr=1e-7, params_dtype=torch.bfloat16, distributed=False)
    return Engine(wrapped, runtime, architecture.vocab_size, Layout("shared_prompt", 1, 1), optimizer)


def _measured(engine: Engine, architecture: Architecture, length: int, note: str) -> dict[str, Any]:
    """Numbers of steps of one length, with full recomputation where they do not fit without."""
    for recompute in (None, "full"):
        _recompute(engine, recompute)
        notes = [note, "recomputed" if recompute else ""]
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            return {**_steps(engine, architecture, length), "note": ", ".join(filter(None, notes))}
        forget()  # here, where the error no longer holds what its frames held
    return {"skipped": "out of memory"}


def _recompute(engine: Engine, granularity: str | None) -> None:
    config = engine.chunks[0].module.config
    config.recompute_granularity = granularity
    config.recompute_method = "uniform" if granularity else None
    config.recompute_num_layers = 1 if granularity else None


def _steps(engine: Engine, architecture: Architecture, length: int) -> dict[str, float]:
    prompt, response = length // 2, length // 4
    units = _units(architecture.vocab_size, prompt, response, max(1, STEP_TOKENS // length))
    has_gpu = engine.runtime.device.type == "cuda"
    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
    engine.layout = replace(engine.layout, micro_batch_tokens=length)
    passes, updates = zip(*(_step(engine, units) for _ in range(1 + TIMED)), strict=True)
    seconds = statistics.median(passes[1:])
    work = Work(prompt, response, response, longest_unit=length, micro_batch_tokens=length)
    flops = unit_flops(shape_of(architecture), work)
    needed = 3 * (flops.layers + flops.attention + flops.head) * units.num_units  # backward: twice forward
    return {
        "tokens_per_second": units.num_units * (prompt + 2 * response) / seconds,
        "flops_per_second": needed / seconds,
        "update_seconds": statistics.median(updates[1:]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if has_gpu else 0.0,
    }


def _step(engine: Engine, units: Units) -> tuple[float, float]:
    """Seconds of the passes over all units, and of the update."""
    loss = partial(spin_loss, objective=build_objective(loss="logistic", beta=0.1))
    start = time.perf_counter()
    engine.backward(units, np.arange(units.num_units), loss=loss, names=SPIN_SUMS)  # ends with its sums
    middle = time.perf_counter()
    engine.update(1e-7)
    torch.cuda.synchronize()
    return middle - start, time.perf_counter() - middle


def token_ids(vocab_size: int, prompt: int, response: int, number: int) -> dict[str, pa.Array]:
    """Random ids of pairs, by column."""
    generator = np.random.default_rng(1)
    sizes = {"prompt_ids": prompt, "real_ids": response, "generated_ids": response}
    return {
        name: pa.array(
            [generator.integers(0, vocab_size, size).astype(np.int32) for _ in range(number)],
            pa.list_(pa.int32()),
        )
        for name, size in sizes.items()
    }


def _units(vocab_size: int, prompt: int, response: int, number: int) -> Units:
    columns = token_ids(vocab_size, prompt, response, number)
    for name in ("opponent_real_logps", "opponent_generated_logps"):
        columns[name] = pa.array(np.full(number, -10.0 * response))
    return Units(pa.table(columns))


def forget() -> None:
    """Gives back what a failed attempt holds."""
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(value) for value in sys.argv[3:]])
