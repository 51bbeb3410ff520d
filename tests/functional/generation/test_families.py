"""Every family that the real vLLM has: it loads what we export, and answers as `transformers` does."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from nemo_spin.generation.environment import find_python
from tests.distributed.bridge import ranks
from tests.distributed.harness import run_ranks
from tests.unit.bridge.checkpoints import CLASSES, COMMON, make_checkpoint

MAX_TOKENS = 16
NOT_IN_VLLM = {"gpt_neo"}
_SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}  # 32 channels: CPU's least
SETTINGS: dict[str, dict[str, Any]] = {
    **{family: {**_SIZES, "head_dim": 32} for family in ("mistral", "qwen3", "gemma2", "gemma3")},
    "llama": {**_SIZES, "head_dim": 32, "attention_bias": True, "mlp_bias": True},
    "qwen2": {**_SIZES, "use_sliding_window": False},  # vLLM has no windows in some of Qwen2's layers
    "phi3": {
        **_SIZES,
        "original_max_position_embeddings": 64,
        "max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0 + 0.1 * pair for pair in range(8)],
            "long_factor": [4.0] * 8,
        },
    },
    "olmo2": _SIZES,
    "gpt2": {"n_embd": 64, "n_head": 2, "scale_attn_weights": True},  # vLLM always scales
    "gpt_neox": {"hidden_size": 64, "num_attention_heads": 2},
    "mixtral": {**_SIZES, "intermediate_size": 32},
    "qwen2_moe": {**_SIZES, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**_SIZES, "head_dim": 32, "moe_intermediate_size": 32},
}
OFTEN = ["gemma3", "gpt2"]  # each engine takes seconds


def test_no_family_is_forgotten() -> None:
    assert set(CLASSES) - set(SETTINGS) == NOT_IN_VLLM


def _with_decoys(directory: Path) -> Path:
    """Files that vLLM would prefer, or fall back to, if it were free to choose what it loads.

    Another safetensors file beside a single one is refused before (`open_checkpoint`).
    """
    for name in ("params.json", "pytorch_model.bin", "model.pt"):
        (directory / name).write_text("not what was checked")
    return directory


def _continuations(directory: Path, prompts: list[list[int]]) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return [
        model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            pad_token_id=COMMON["pad_token_id"],
        )[0, len(ids) :].tolist()
        for ids in prompts
    ]


@pytest.mark.vllm
@pytest.mark.parametrize(
    "families",
    [
        pytest.param(OFTEN, id="least-alike"),
        pytest.param([f for f in SETTINGS if f not in OFTEN], id="others", marks=pytest.mark.slow),
    ],
)
def test_greedy_continuations_are_those_of_transformers(tmp_path: Path, families: list[str]) -> None:
    chance = np.random.default_rng(1)
    # longer than the windows, so that what they hide matters
    prompts = [chance.integers(3, COMMON["vocab_size"], length).tolist() for length in (5, 14, 20)]
    models: dict[str, str] = {}
    for family in families:
        source = make_checkpoint(tmp_path / family / "source", family, std=0.2, **SETTINGS[family])
        run_ranks(ranks.convert, 1, 1, 1, source, tmp_path / family / "exported", {})
        models[family] = str(_with_decoys(tmp_path / family / "exported"))
    asked, answered = tmp_path / "asked.json", tmp_path / "answered.json"
    asked.write_text(json.dumps({"models": models, "prompts": prompts, "max_tokens": MAX_TOKENS}))
    subprocess.run(
        [
            find_python(os.environ.get("NEMO_SPIN_VLLM_PYTHON")),
            "-m",
            "tests.functional.generation.family_answers",
            str(asked),
            str(answered),
        ],
        check=True,
        timeout=500,
        cwd=Path(__file__).parents[3],
        capture_output=True,
    )
    expected = {name: _continuations(Path(directory), prompts) for name, directory in models.items()}
    assert json.loads(answered.read_text()) == expected
