"""One epoch of self-play training, reference scoring included, against TRL's DPOTrainer.

Both get the same weights, token ids, batches and AdamW, in float32 on the same threads, each in a
process of its own, in turns; the losses of all steps must agree to 1e-3, or nothing is compared. The
peer runs with the reference's log-probabilities computed before (`precompute_ref_log_probs`) or
by a second model in every step, with several microbatch sizes, and with its pairs sorted by length
inside of each batch, so that it pads least; what counts is its fastest. Memory is the most that was
resident above the loaded model. Needs `pip install trl`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from examples.benchmarks.chat_lengths import PROMPT, RESPONSE, lengths, random_pairs
from examples.benchmarks.measure import PeakMemory, Run, column, ratios, show, spread, summary, take_turns
from examples.benchmarks.small_llama import engine_of, write_llama

SUMMARY = "an epoch of training with reference scoring, against TRL's DPOTrainer"
_OURS = "nemo_spin"
_BETA = 0.1
_LR = 1e-4  # large enough for the losses of later steps to differ from ln 2
_SCORED_TOGETHER = 64
_TOLERANCE = 1e-3
_SHAPES = {"equal": (250, 250, 250), "long_prompt": (800, 200, 200)}  # prompt, real, generated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of model and data."""
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--lengths", choices=("chat", *_SHAPES), default="chat")
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all lengths")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192, help="of our packed rows")
    parser.add_argument("--peer-micro-batch-sizes", type=int, nargs="+", default=[1, 4], help="pairs")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and tokens")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures all ways in turn, checks that they did the same, and prints them."""
    try:
        import trl  # noqa: F401
    except ImportError:
        raise SystemExit("the peer is not installed: pip install trl") from None
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        write_llama(
            place / "model", vocabulary=options.vocabulary, hidden=options.hidden, layers=options.layers
        )
        pq.write_table(
            sorted_within_batches(_pairs(options), options.global_batch_size), place / "pairs.parquet"
        )
        ways: dict[str, Any] = {_OURS: (_ours, (place, options))}
        for size in options.peer_micro_batch_sizes:
            for precomputed in (True, False):
                name = f"TRL, microbatches of {size}, " + ("precomputed" if precomputed else "second model")
                ways[name] = (_peer, (place, options, size, precomputed))
        runs = take_turns(ways, options.repeats)
    _check_same(runs)
    return _report(runs, options)


def _pairs(options: argparse.Namespace) -> pa.Table:
    generator = np.random.default_rng(options.seed)
    if options.lengths == "chat":
        shapes = (PROMPT, RESPONSE, RESPONSE)
        sizes = np.stack(
            [lengths(generator, options.pairs, shape, options.scale) for shape in shapes], axis=1
        )
    else:
        one = np.maximum(np.array(_SHAPES[options.lengths]) * options.scale, 1).astype(np.int64)
        sizes = np.tile(one, (options.pairs, 1))
    return random_pairs(sizes, vocabulary=options.vocabulary, generator=generator)


def sorted_within_batches(pairs: pa.Table, batch: int) -> pa.Table:
    """The same batches, each with its pairs by the length that a row of the peer is padded to."""
    prompt, *responses = (
        np.array([len(ids) for ids in pairs[name].to_pylist()])
        for name in ("prompt_ids", "real_ids", "generated_ids")
    )
    padded = prompt + np.maximum(*responses)
    order = np.lexsort((padded, np.arange(pairs.num_rows) // batch))
    return pairs.take(order)


# ---- ours ----


def _ours(place: Path, options: argparse.Namespace) -> Run:
    """Scoring and one epoch."""
    import torch

    from nemo_spin.config.schema import OptimConfig
    from nemo_spin.data.datasets import Units
    from nemo_spin.data.packing import Layout
    from nemo_spin.megatron.forward_step import SPIN_SUMS, spin_loss
    from nemo_spin.objective.objective import build_objective

    torch.set_num_threads(options.threads)
    engine = engine_of(place / "model", optim=OptimConfig(name="adam"))
    engine.layout = Layout("shared_prompt", options.micro_batch_tokens, 1)
    pairs = pq.read_table(place / "pairs.parquet")
    loss = partial(spin_loss, objective=build_objective(loss="logistic", beta=_BETA))
    losses = []
    PeakMemory.reset()
    before, start = PeakMemory.now(), time.perf_counter()
    units = _scored(engine, pairs, Units)
    for first in range(0, units.num_units, options.global_batch_size):
        batch = np.arange(first, min(first + options.global_batch_size, units.num_units))
        sums = engine.backward(units, batch, loss=loss, names=SPIN_SUMS)
        losses.append(sums["loss"] / sums["units"])
        engine.update(_LR)
    return _result(losses, start, before, options.pairs)


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


def _result(losses: list[float], start: float, before: int, pairs: int) -> Run:
    seconds = time.perf_counter() - start
    measured = {"seconds": seconds, "pairs_per_second": pairs / seconds}
    measured["above_mib"] = (PeakMemory.peak() - before) / 2**20
    return measured | {f"loss_{step}": loss for step, loss in enumerate(losses)}


# ---- the peer ----


def _peer(place: Path, options: argparse.Namespace, micro_batch_size: int, precomputed: bool) -> Run:
    """The same by DPOTrainer; its own tokenization is left out, since ids are given."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, PrinterCallback
    from transformers.utils import logging
    from trl import DPOConfig, DPOTrainer

    from nemo_spin.config.schema import OptimConfig

    class GivenIds(DPOTrainer):  # type: ignore[misc]
        """Takes token ids as they are, and batches in the order of the rows."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    pairs = pq.read_table(place / "pairs.parquet")
    names = {"prompt_ids": "prompt_ids", "real_ids": "chosen_ids", "generated_ids": "rejected_ids"}
    dataset = Dataset(pairs.select(list(names)).rename_columns(list(names.values())))
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    same = OptimConfig()
    arguments = DPOConfig(
        output_dir=str(place / "peer"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=options.global_batch_size // micro_batch_size,
        num_train_epochs=1,
        learning_rate=_LR,
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_beta1=same.betas[0],
        adam_beta2=same.betas[1],
        adam_epsilon=same.eps,
        weight_decay=same.weight_decay,
        max_grad_norm=same.clip_grad,
        gradient_checkpointing=False,
        beta=_BETA,
        max_length=None,
        precompute_ref_log_probs=precomputed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    PeakMemory.reset()
    before, start = PeakMemory.now(), time.perf_counter()
    trainer = GivenIds(model, args=arguments, train_dataset=dataset, processing_class=_tokenizer())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return _result(losses, start, before, options.pairs)


def _tokenizer() -> Any:
    """What the peer asks for a padding token, and nothing else."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


# ---- both ----


def _check_same(runs: dict[str, list[Run]]) -> None:
    """Every way must have had the same losses, step by step."""
    expected = {key: value for key, value in runs[_OURS][0].items() if key.startswith("loss_")}
    for name, turns in runs.items():
        for turn in turns:
            found = {key: value for key, value in turn.items() if key.startswith("loss_")}
            if found.keys() != expected.keys():
                raise SystemExit(f"{name} took {len(found)} steps, not {len(expected)}: nothing to compare")
            difference = max(abs(found[key] - expected[key]) for key in expected)
            if difference > _TOLERANCE:
                raise SystemExit(f"losses of {name} differ by {difference:.2g}: nothing to compare")


def _report(runs: dict[str, list[Run]], options: argparse.Namespace) -> dict[str, Any]:
    peers = [name for name in runs if name != _OURS]
    best = min(peers, key=lambda name: float(np.median(column(runs[name], "seconds"))))
    results: dict[str, Any] = {}
    rows = []
    for name, turns in runs.items():
        speed = ratios(runs[best], turns, "seconds")
        results[name] = {
            key: summary(column(turns, key)) for key in ("seconds", "pairs_per_second", "above_mib")
        } | {"speed_over_best_peer": summary(speed)}
        values = (("seconds", 2), ("pairs_per_second", 2), ("above_mib", 0))
        rows.append([name, *(spread(column(turns, key), digits) for key, digits in values), spread(speed)])
    last = max(key for key in runs[_OURS][0] if key.startswith("loss_"))
    results["last_loss"] = {name: turns[0][last] for name, turns in runs.items()}
    title = (
        f"{options.pairs} pairs, lengths: {options.lengths}, hidden {options.hidden}, {options.layers} layers"
    )
    headings = ["", "seconds", "pairs/s", "MiB above the model", "x the fastest of TRL"]
    show(f"{title}; median (extremes) of {options.repeats} turns", headings, rows)
    return results
