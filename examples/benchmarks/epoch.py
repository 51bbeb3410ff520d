"""The same epoch of training by this project and by TRL's DPOTrainer, reference scoring included.

Both get the same weights, token ids, batches and AdamW, in float32 on as many threads; each is to run
in a process of its own. What a run reports: seconds, CPU seconds of all threads, most resident memory
(whole, and above what the imports took), and the loss of every step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from examples.benchmarks.measure import PeakMemory, Run
from examples.benchmarks.small_llama import engine_of

OURS = "nemo_spin"
TOLERANCE = 1e-3  # between losses of the same step
_BETA = 0.1
_LR = 1e-4  # large enough for the losses of later steps to differ from ln 2
_SCORED_TOGETHER = 64


@dataclass(frozen=True)
class Epoch:
    """What is trained on, whoever does it.

    Attributes:
        model: A Hugging Face directory.
        pairs: A parquet file with `prompt_ids`, `real_ids`, `generated_ids`, in the order of the batches.
        global_batch_size: Pairs of an optimizer step.
        threads: Of the process.
    """

    model: Path
    pairs: Path
    global_batch_size: int
    threads: int


class _Clock:
    """Runs from its making; `memory_before` is what the imports took."""

    def __init__(self, memory_before: int) -> None:
        self._memory_before = memory_before
        PeakMemory.reset()
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def result(self, losses: Sequence[float], pairs: int) -> Run:
        seconds, peak = time.perf_counter() - self._start, PeakMemory.peak()
        return {
            "seconds": seconds,
            "cpu_seconds": time.process_time() - self._cpu_start,
            "pairs_per_second": pairs / seconds,
            "whole_mib": peak / 2**20,
            "above_mib": (peak - self._memory_before) / 2**20,
            **{f"loss_{step}": loss for step, loss in enumerate(losses)},
        }


def check_same(runs: dict[str, list[Run]]) -> None:
    """Ends the program unless every way had the same losses, step by step."""
    expected = losses_of(runs[OURS][0])
    for name, turns in runs.items():
        for found in map(losses_of, turns):
            if found.keys() != expected.keys():
                raise SystemExit(f"{name} took {len(found)} steps, not {len(expected)}: nothing to compare")
            difference = max(abs(found[key] - expected[key]) for key in expected)
            if not difference <= TOLERANCE:
                raise SystemExit(f"losses of {name} differ by {difference:.2g}: nothing to compare")


def losses_of(run: Run) -> dict[str, float]:
    """Of every step, in the order of the steps."""
    return {key: value for key, value in run.items() if key.startswith("loss_")}


# ---- this project ----


def by_nemo_spin(epoch: Epoch, micro_batch_tokens: int, recompute: bool = False) -> Run:
    """Scoring by the model that is about to be trained, and one epoch.

    Args:
        epoch: What is trained on.
        micro_batch_tokens: Of a packed row.
        recompute: Activations are computed again in the backward pass, layer by layer.
    """
    import torch

    from nemo_spin.config.schema import OptimConfig
    from nemo_spin.data.datasets import Units
    from nemo_spin.data.packing import Layout
    from nemo_spin.megatron import optimizers, provider  # noqa: F401  counted as imports
    from nemo_spin.megatron.forward_step import SPIN_SUMS, spin_loss
    from nemo_spin.objective.objective import build_objective

    torch.set_num_threads(epoch.threads)
    pairs = pq.read_table(epoch.pairs)
    clock = _Clock(PeakMemory.now())
    engine = engine_of(epoch.model, optim=OptimConfig(name="adam"), recompute=recompute)
    engine.layout = Layout("shared_prompt", micro_batch_tokens, 1)
    loss = partial(spin_loss, objective=build_objective(loss="logistic", beta=_BETA))
    losses = []
    units = _scored(engine, pairs, Units)
    for first in range(0, units.num_units, epoch.global_batch_size):
        batch = np.arange(first, min(first + epoch.global_batch_size, units.num_units))
        sums = engine.backward(units, batch, loss=loss, names=SPIN_SUMS)
        losses.append(sums["loss"] / sums["units"])
        engine.update(_LR)
    return clock.result(losses, pairs.num_rows)


def _scored(engine: Any, pairs: pa.Table, units_of: Any) -> Any:
    """The pairs with the opponent's log-probabilities."""
    units = units_of(pairs)
    values: dict[int, tuple[float, float]] = {}
    for start in range(0, units.num_units, _SCORED_TOGETHER):
        values |= engine.score(units, np.arange(start, min(start + _SCORED_TOGETHER, units.num_units)))
    for index, kind in enumerate(("real", "generated")):
        name = f"opponent_{kind}_logps"
        scored = pa.array([values[row][index] for row in range(pairs.num_rows)], pa.float64())
        pairs = pairs.set_column(pairs.schema.get_field_index(name), name, scored)
    return units_of(pairs)


# ---- the peer ----


def by_trl(epoch: Epoch, micro_batch_size: int, precomputed: bool, recompute: bool = False) -> Run:
    """The same by DPOTrainer; its own tokenization is left out, since ids are given.

    Args:
        epoch: What is trained on.
        micro_batch_size: Pairs of a microbatch, in training and in computing the reference.
        precomputed: The reference's log-probabilities are computed before; else by a second model.
        recompute: `gradient_checkpointing`.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, PrinterCallback  # noqa: F401

    from examples.benchmarks.given_ids_trainer import (
        bare_tokenizer,
        given_ids_trainer,
        head_as_on_gpus,
        peer_rows,
    )

    trainer_type = given_ids_trainer()
    head_as_on_gpus()
    torch.set_num_threads(epoch.threads)
    dataset = peer_rows(pq.read_table(epoch.pairs))
    arguments = _arguments(epoch, micro_batch_size, precomputed, recompute)
    clock = _Clock(PeakMemory.now())
    model = AutoModelForCausalLM.from_pretrained(epoch.model)
    trainer = trainer_type(model, args=arguments, train_dataset=dataset, processing_class=bare_tokenizer())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return clock.result(losses, dataset.num_rows)


def _arguments(epoch: Epoch, micro_batch_size: int, precomputed: bool, recompute: bool) -> Any:
    """DPOTrainer's settings; AdamW is PyTorch's fused one, its default."""
    from trl import DPOConfig

    from nemo_spin.config.schema import OptimConfig

    same = OptimConfig()
    return DPOConfig(
        output_dir=str(epoch.pairs.parent / "peer"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=epoch.global_batch_size // micro_batch_size,
        num_train_epochs=1,
        learning_rate=_LR,
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_beta1=same.betas[0],
        adam_beta2=same.betas[1],
        adam_epsilon=same.eps,
        weight_decay=same.weight_decay,
        max_grad_norm=same.clip_grad,
        gradient_checkpointing=recompute,
        beta=_BETA,
        max_length=None,
        precompute_ref_log_probs=precomputed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
