"""Measures the same steps by TRL's DPOTrainer: `MODEL LENGTH...`, a JSON line for each.

The pairs of `gpu_training`, a model of the same shape with random weights in `transformers`, and the
reference's log-probabilities computed before, so that only training is timed. Weights and AdamW are in
float32 and computing in bfloat16 by autocast, which is the peer's way to keep main weights. Attention is
FlashAttention's where it is installed, else PyTorch's; layers are Liger's where they are. A pair at a
time: each is a row of prompt and real response and one of prompt and generated response.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from examples.benchmarks.gpu_training import MODELS, STEP_TOKENS, TIMED, forget, token_ids
from nemo_spin.megatron.architecture import Architecture

_TOLERANCE = 1e-3  # of the first loss, which is ln 2


def main(name: str, lengths: list[int]) -> None:
    """Measures each length, with activations recomputed where they do not fit without."""
    architecture = MODELS[name]
    for length in lengths:
        print(json.dumps({"row": length, **_measured(architecture, length)}), flush=True)


def _measured(architecture: Architecture, length: int) -> dict[str, Any]:
    for recompute in (False, True):
        forget()
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            found = _steps(architecture, length, recompute=recompute)
            return {**found, "note": ", ".join([*_kernels(), *(["recomputed"] if recompute else [])])}
    return {"skipped": "out of memory"}


def _kernels() -> list[str]:
    """What is used of others' kernels."""
    from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

    if not torch.cuda.is_available():
        return []
    there = {"FlashAttention": is_flash_attn_2_available(), "Liger": is_liger_kernel_available()}
    return [name for name, is_there in there.items() if is_there]


def _steps(architecture: Architecture, length: int, *, recompute: bool) -> dict[str, float]:
    from transformers import PrinterCallback, TrainerCallback

    from examples.benchmarks.given_ids_trainer import bare_tokenizer, given_ids_trainer, peer_rows

    trainer_type = given_ids_trainer()
    prompt, response = length // 2, length // 4
    pairs = max(1, STEP_TOKENS // length)
    columns = token_ids(architecture.vocab_size, prompt, response, pairs * (1 + TIMED))
    has_gpu = torch.cuda.is_available()
    times: list[float] = []  # of a step's begin, its passes' end and its update's end

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(_now())

        on_pre_optimizer_step = on_step_end = on_step_begin

    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_type(
            _model(architecture),
            args=_arguments(directory, pairs, has_gpu=has_gpu, recompute=recompute),
            train_dataset=peer_rows(pa.table(columns)),
            processing_class=bare_tokenizer(),
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    if abs(first - math.log(2)) > _TOLERANCE:
        raise SystemExit(f"the first loss is {first}, not ln 2: nothing to compare")
    begins, passed, updated = (np.array(times[place::3][1:]) for place in range(3))
    return {
        "tokens_per_second": pairs * (prompt + 2 * response) / statistics.median(passed - begins),
        "update_seconds": statistics.median(updated - passed),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if has_gpu else 0.0,
    }


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _model(architecture: Architecture) -> Any:
    """A Llama of that shape, on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.ffn_hidden_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_attention_heads,
        num_key_value_heads=architecture.num_query_groups,
        head_dim=architecture.head_dim,
        max_position_embeddings=architecture.max_position_embeddings,
        tie_word_embeddings=architecture.tie_word_embeddings,
        attn_implementation="flash_attention_2" if "FlashAttention" in _kernels() else "sdpa",
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return LlamaForCausalLM(config)


def _arguments(directory: str, pairs: int, *, has_gpu: bool, recompute: bool) -> Any:
    from trl import DPOConfig

    return DPOConfig(
        output_dir=directory,
        use_cpu=not has_gpu,
        bf16=has_gpu,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=pairs,
        max_steps=1 + TIMED,
        learning_rate=1e-7,
        max_length=None,
        gradient_checkpointing=recompute,
        precompute_ref_log_probs=True,
        use_liger_kernel="Liger" in _kernels(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main(sys.argv[1], [int(value) for value in sys.argv[2:]])
