"""An independent computation of everything a step computes: `transformers` in float64, no batching."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

IDS = pa.list_(pa.int32())
VOCAB_SIZE = 99  # odd, so that two tensor-parallel ranks need a padded row


def make_model(directory: Path, family: str = "llama", **settings: Any) -> Path:
    """A random two-layer model, saved by transformers."""
    torch.manual_seed(7)
    config_class = {"llama": LlamaConfig, "qwen3": Qwen3Config}[family]
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **settings,
    }
    if family == "qwen3":
        common.setdefault("head_dim", 8)
    model = AutoModelForCausalLM.from_config(config_class(**common), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start as ones: make them count
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def make_pairs(num_rows: int, seed: int = 3, vocab_size: int = VOCAB_SIZE) -> pa.Table:
    """Prompts and two responses each, of different lengths, without opponent values."""
    generator = np.random.default_rng(seed)

    def column(low: int, high: int) -> pa.Array:
        sizes = generator.integers(low, high, num_rows)
        return pa.array([generator.integers(3, vocab_size, size).tolist() for size in sizes], IDS)

    return pa.table({"prompt_ids": column(1, 9), "real_ids": column(1, 12), "generated_ids": column(1, 12)})


def logps(model: Any, table: pa.Table) -> torch.Tensor:
    """[rows, 2] sums of log-probabilities of real and generated responses, differentiable."""
    values = []
    for row in table.to_pylist():
        for name in ("real_ids", "generated_ids"):
            prompt, response = row["prompt_ids"], row[name]
            logits = model(torch.tensor([prompt + response])).logits[0]
            per_token = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            values.append(per_token.gather(-1, torch.tensor(response)[:, None]).sum())
    return torch.stack(values).reshape(-1, 2)


def load(directory: Path) -> Any:
    """The model of `directory` in float64."""
    return AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float64,
        experts_implementation="eager",  # the fused ones have no float64
    )


def with_opponent(table: pa.Table, opponent_logps: torch.Tensor) -> pa.Table:
    """`table` with the columns that scoring adds."""
    for index, kind in enumerate(("real", "generated")):
        values = pa.array(opponent_logps[:, index].tolist(), pa.float64())
        table = table.append_column(f"opponent_{kind}_logps", values)
    return table


def add_adapters(model: Any, directory: Path) -> dict[str, torch.nn.Parameter]:
    """Writes out y + alpha / r B A x for every adapter in `directory`, in float64; returns A's and B's."""
    config = json.loads((directory / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    tensors = {
        name: torch.nn.Parameter(value.double())
        for name, value in load_file(directory / "adapter_model.safetensors").items()
    }
    modules = {name.removeprefix("base_model.model.").rsplit(".", 2)[0] for name in tensors}
    for module in modules:
        a, b = (tensors[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")

        def add(_: Any, args: Any, output: Any, a: Any = a, b: Any = b) -> Any:
            return output + scaling * (args[0] @ a.T) @ b.T

        model.get_submodule(module).register_forward_hook(add)
    return tensors


def spin_step(
    directory: Path,
    table: pa.Table,
    beta: float,
    weights: torch.Tensor | None = None,
    adapter: Path | None = None,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Logistic SPIN loss of all pairs, weighted (their mean by default), and its gradient.

    The gradient has an entry for every tensor of the checkpoint, or of the adapter if there is one.
    """
    model = load(directory)
    trained = dict(model.named_parameters()) if adapter is None else add_adapters(model, adapter)
    policy = logps(model, table)
    opponent = torch.tensor(
        np.stack([table["opponent_real_logps"].to_numpy(), table["opponent_generated_logps"].to_numpy()], 1)
    )
    gains = policy - opponent
    margins = beta * (gains[:, 0] - gains[:, 1])
    losses = torch.log1p(torch.exp(-margins))
    loss = losses.mean() if weights is None else (weights * losses).sum()
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in trained.items()}
