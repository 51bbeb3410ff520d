"""Export and import of a checkpoint, against copying and reading the same bytes and `transformers`.

A random Llama in bfloat16 is exported by this project's bridge (hashes and manifest
included), copied with `cp` and synced, and saved by `save_pretrained` and synced; then read with
`cat`, imported by the bridge, and loaded by `from_pretrained`. Before each reading the file's pages
are dropped from the page cache; before everything free memory is touched (`back_free_memory`).
Memory is the most that a rank had resident (VmHWM: its own pages, and those of files that it
had mapped) above what it had with its parameters, over the size of the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.benchmarks.measure import (
    PeakMemory,
    Run,
    back_free_memory,
    column,
    ratios,
    show,
    spread,
    summary,
    take_turns,
)

SUMMARY = "export and import, against cp, cat and transformers"
_ALTERNATIVES = ("cp + fsync", "export", "save_pretrained + fsync", "cat", "import", "from_pretrained")
_TIMEOUT_S = 1800.0
_NOISE = 1_000_003  # numbers that are repeated; no row begins like another


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes and the place."""
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument(
        "--transformers", action=argparse.BooleanOptionalAction, default=True, help="measure it too"
    )
    parser.add_argument("--directory", type=Path, help="on the disk to measure; default: a temporary one")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures all ways in turn, and prints them."""
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        place = Path(directory)
        _write_config(place / "source", options)
        common = (str(place), options.ranks, options.threads)
        names = [name for name in _ALTERNATIVES if options.transformers or "pretrained" not in name]
        runs = take_turns({name: (_measure, (name, *common)) for name in names}, options.repeats)
    return _report(runs, options)


def _write_config(source: Path, options: argparse.Namespace) -> None:
    source.mkdir()
    heads = max(1, options.hidden // 128)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": options.hidden,
        "intermediate_size": options.hidden * 11 // 4,
        "num_hidden_layers": options.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": options.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _report(runs: dict[str, list[Run]], options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    rows = []
    for name in runs:
        base = "cp + fsync" if name in _ALTERNATIVES[:3] else "cat"
        speed = ratios(runs[base], runs[name], "seconds")
        memory = column(runs[name], "memory_over_largest") if "memory_over_largest" in runs[name][0] else None
        results[name] = {
            "seconds": summary(column(runs[name], "seconds")),
            "speed_over_disk": summary(speed),
            **({"memory_over_largest": summary(memory)} if memory else {}),
        }
        megabytes = [run["bytes"] / run["seconds"] / 1e6 for run in runs[name]]
        rows.append(
            [
                name,
                spread(column(runs[name], "seconds")),
                spread(megabytes, 0),
                spread(speed),
                spread(memory) if memory else "",
            ]
        )
    size = runs["export"][0]["bytes"] / 1e9
    largest = max(options.vocabulary, options.hidden * 11 // 4) * options.hidden * 2 / 1e6
    title = f"{size:.2f} GB in bfloat16, largest tensor {largest:.0f} MB, tensor parallel {options.ranks}; "
    title += f"median (extremes) of {options.repeats} turns"
    show(
        title,
        ["", "seconds", "MB/s", "speed over cp or cat", "memory above the shard, over largest tensor"],
        rows,
    )
    return results


def _measure(name: str, place: str, ranks: int, threads: int) -> Run:
    directory = Path(place)
    source, exported, copy, saved = (directory / part for part in ("source", "exported", "copy", "saved"))
    if not exported.exists():  # the bytes that are to be copied
        _in_ranks(ranks, _export, source, exported, threads)
    if name in ("cat", "import", "from_pretrained"):
        _drop_from_page_cache(saved if name == "from_pretrained" else exported)
    elif name == "cp + fsync":
        _remove(copy)
    elif name == "save_pretrained + fsync":
        _remove(saved)
    else:
        _remove(exported)
    if name == "cp + fsync":
        seconds = _timed(f"cp -r {exported} {copy} && sync {copy}/*", _weight_bytes(exported))
        measured: Run = {"seconds": seconds}
    elif name == "cat":
        measured = {"seconds": _timed(f"cat {exported}/*.safetensors > /dev/null", _weight_bytes(exported))}
    elif name == "export":
        measured = _in_ranks(ranks, _export, source, exported, threads)
    elif name == "import":
        measured = _in_ranks(ranks, _import, exported, exported, threads)
    elif name == "save_pretrained + fsync":
        measured = _save_pretrained(exported, saved, threads)
    else:
        measured = _from_pretrained(saved, threads)
    weights = saved if name.endswith("pretrained") or name.startswith("save") else exported
    return {**measured, "bytes": float(_weight_bytes(weights))}


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _timed(command: str, num_bytes: int) -> float:
    _back_memory_for(num_bytes)
    start = time.perf_counter()
    subprocess.run(["bash", "-c", command], check=True)
    return time.perf_counter() - start


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    os.sync()


def _drop_from_page_cache(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _in_ranks(ranks: int, function: Callable[..., Run], *arguments: Any) -> Run:
    """Calls it in `ranks` processes; the slowest and largest numbers of them all."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    processes = [
        context.Process(target=_rank_main, args=(results, rank, ranks, port, function, arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        runs: list[Run] = [results.get(timeout=_TIMEOUT_S) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return {key: max(run[key] for run in runs) for key in runs[0]}


def _rank_main(
    results: Any, rank: int, ranks: int, port: int, function: Callable[..., Run], arguments: tuple[Any, ...]
) -> None:
    warnings.simplefilter("ignore")  # of Megatron, that Transformer Engine and Apex are not there
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    results.put(function(ranks, *arguments))


def _model(ranks: int, source: Path, threads: int) -> tuple[list[Any], Any]:
    """This rank's share of a random model."""
    import torch

    from nemo_spin.bridge.families import architecture_of
    from nemo_spin.config.schema import ModelConfig
    from nemo_spin.megatron.provider import build_model
    from nemo_spin.megatron.runtime import initialize

    torch.set_num_threads(max(1, threads // ranks))
    initialize(tensor_model_parallel_size=ranks, pipeline_model_parallel_size=1, seed=1)
    architecture = architecture_of(source)
    model = ModelConfig(path=str(source), tensor_model_parallel_size=ranks)
    chunks = build_model(architecture, model, params_dtype=torch.bfloat16)
    noise = torch.randn(_NOISE).mul_(0.02).to(torch.bfloat16)  # a gigabyte of it takes longer than an export
    for parameter in chunks[0].parameters():
        for part in parameter.data.view(-1).split(_NOISE):
            part.copy_(noise[: part.numel()])
    return chunks, architecture


def _back_memory_for(num_bytes: int) -> None:
    """At the last moment: free memory that nobody uses goes back to the host within seconds."""
    back_free_memory(2 * num_bytes)  # the file's pages, and what becomes of them in a process


def _watched(action: Callable[[], Any], chunks: list[Any], architecture: Any) -> Run:
    """Seconds, and the most memory beside the parameters over the size of the largest tensor."""
    from torch import distributed

    largest = max(architecture.vocab_size, architecture.ffn_hidden_size) * architecture.hidden_size * 2
    if distributed.get_rank() == 0:
        own = sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
        _back_memory_for(own * distributed.get_world_size())
    distributed.barrier()
    PeakMemory.reset()
    before, start = PeakMemory.now(), time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory_over_largest": (PeakMemory.peak() - before) / largest}


def _export(ranks: int, source: Path, exported: Path, threads: int) -> Run:
    from nemo_spin.bridge.export_hf import export_weights
    from nemo_spin.data.progress import SilentProgress

    chunks, architecture = _model(ranks, source, threads)
    return _watched(
        lambda: export_weights(
            chunks,
            architecture=architecture,
            source_dir=source,
            out_dir=exported,
            progress=SilentProgress(),
        ),
        chunks,
        architecture,
    )


def _import(ranks: int, source: Path, exported: Path, threads: int) -> Run:
    from nemo_spin.bridge.import_hf import load_weights

    chunks, architecture = _model(ranks, source, threads)
    _drop_from_page_cache(exported)
    return _watched(lambda: load_weights(chunks, exported, architecture), chunks, architecture)


def _save_pretrained(exported: Path, saved: Path, threads: int) -> Run:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.bfloat16)
    _back_memory_for(_weight_bytes(exported))
    start = time.perf_counter()
    model.save_pretrained(saved)
    subprocess.run(["bash", "-c", f"sync {saved}/*"], check=True)
    return {"seconds": time.perf_counter() - start}


def _from_pretrained(saved: Path, threads: int) -> Run:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    _drop_from_page_cache(saved)
    _back_memory_for(_weight_bytes(saved))
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.detach().view(torch.int16).max()  # what is only mapped so far is read now
    return {"seconds": time.perf_counter() - start}
