"""Training on one GPU: tokens/s, share of the measured matmul rate and memory, by model and row length.

Every model and kind of layer is measured in a process of its own (`gpu_training`), and so are
TRL's DPOTrainer, where it is installed (`gpu_peer`), and the sampler (`gpu_generation`); what does
not fit into the time or the memory is said to. The
interpreter needs torch, megatron-core and what `nemo_spin.megatron` imports: no NeMo.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "vllm", "apex", "flash-attn", "triton")
_PEER_PACKAGES = ("trl", "transformers", "liger-kernel")
_LEAST_SECONDS = 25.0  # for importing, building a model and a few steps of it
_MOST_SECONDS = 110.0  # of one process; its later lengths wait for another day
_MODELS = ("8B", "1B", "0.5B", "3B")  # the most telling first, should time run out
_WITH_PEER = ("1B", "0.5B", "3B", "tiny")  # 16 bytes a weight of the largest fill a card
_PEER = "TRL"
_LENGTHS = (4096, 8192, 16384, 32768)
_TINY_LENGTHS = (64, 128)


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; returns 1 where something failed, 0 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmarks.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="for everything")
    parser.add_argument("--json", type=Path, default=Path("runs", "benchmarks", "gpu.json"))
    parser.add_argument("--tiny", action="store_true", help="a rehearsal, on CPU where there is no GPU")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    results: dict[str, Any] = {"versions": versions(), "date": time.strftime("%Y-%m-%d")}
    results["card"] = run("examples.benchmarks.gpu_rate", ["--tiny"] if options.tiny else [], deadline)[-1]
    results["generation"] = generation(options.tiny, deadline)  # first: training takes all that is left
    results["training"] = training(options.tiny, deadline)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    show(results)
    problems = [entry for entry in (results["card"], *results["training"]) if "error" in entry]
    return int(bool(problems))


def versions() -> dict[str, str | None]:
    """What is installed of the packages that matter; None where one is not."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_PEER_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def training(tiny: bool, deadline: float) -> list[dict[str, Any]]:
    """One entry for each model, kind of layer and length."""
    has_engine = importlib.util.find_spec("transformer_engine") is not None and not tiny
    kinds = ("transformer_engine", "local") if has_engine else ("local",)
    lengths = _TINY_LENGTHS if tiny else _LENGTHS
    measured: list[dict[str, Any]] = []
    for model in ("tiny",) if tiny else _MODELS:
        for kind in kinds:
            names = {"model": model, "layers": kind}
            arguments = [model, kind, *map(str, lengths)]
            lines = run("examples.benchmarks.gpu_training", arguments, deadline)
            measured += [{**names, **line} for line in lines]
        if model in _WITH_PEER and importlib.util.find_spec("trl") is not None:
            lines = run("examples.benchmarks.gpu_peer", [model, *map(str, lengths)], deadline)
            measured += [{"model": model, "layers": _PEER, **line} for line in lines]
    return measured


def generation(tiny: bool, deadline: float) -> dict[str, Any]:
    """Tokens/s of vLLM with random weights; nothing where it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        return {"skipped": "vLLM is not installed"}
    return run("examples.benchmarks.gpu_generation", ["--tiny"] if tiny else [], deadline)[-1]


def run(module: str, arguments: list[str], deadline: float) -> list[dict[str, Any]]:
    """The JSON lines that a module prints, the last one an error if it failed or ran out of time."""
    left = deadline - time.monotonic()
    if left < _LEAST_SECONDS:
        return [{"skipped": "no time left"}]
    print(f"{module.rpartition('.')[2]} {' '.join(arguments)}", flush=True)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        command = [sys.executable, "-m", module, *arguments]
        limit = min(left, _MOST_SECONDS)
        ended = None
        try:
            code = subprocess.run(command, stdout=out, stderr=err, timeout=limit, check=False).returncode
            if code:
                err.seek(0)
                ended = {"error": _last_line(err.read()) or f"exit code {code}"}
        except subprocess.TimeoutExpired:
            ended = {"skipped": "no time left"}
        out.seek(0)
        lines = [json.loads(line) for line in out if line.startswith("{")]
    if ended is None and not lines:
        ended = {"error": f"{module} printed nothing"}
    return [*lines, ended] if ended else lines


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def show(results: dict[str, Any]) -> None:
    """Prints what was measured, the table last."""
    print("  ".join(f"{name} {version}" for name, version in results["versions"].items() if version))
    card, generated = results["card"], results["generation"]
    rate = card.get("flops")
    print(f"{card.get('name')}: " + (f"{rate / 1e12:.1f} TFLOP/s of bf16 matmul" if rate else str(card)))
    if "tokens_per_second" in generated:
        print(f"vLLM, {generated['model']}: {generated['tokens_per_second']:,.0f} tokens/s generated")
    else:
        print(f"vLLM: {generated.get('skipped') or generated.get('error')}")
    form = "{:>6} {:>20} {:>7} {:>10} {:>9} {:>8} {:>9}  {}"
    print(form.format("model", "layers", "row", "tokens/s", "of rate", "GiB", "update s", ""))
    for entry in results["training"]:
        if "tokens_per_second" not in entry:
            reason = entry.get("error") or entry.get("skipped")
            print(form.format(entry["model"], entry["layers"], entry.get("row", ""), *[""] * 4, reason))
            continue
        share = f"{entry['flops_per_second'] / rate:.1%}" if rate and "flops_per_second" in entry else ""
        print(
            form.format(
                entry["model"],
                entry["layers"],
                entry["row"],
                f"{entry['tokens_per_second']:,.0f}",
                share,
                f"{entry['peak_gib']:.1f}",
                f"{entry['update_seconds']:.3f}",
                entry["note"],
            )
        )


if __name__ == "__main__":
    sys.exit(main())
