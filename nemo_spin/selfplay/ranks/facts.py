"""What an export tells of the training behind it, in its model card and its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_spin.config.schema import DataConfig
from nemo_spin.data.files import Manifest, read_manifest
from nemo_spin.data.sources import is_hub_id
from nemo_spin.selfplay.ranks.context import StageContext

_METRICS = ("steps", "pairs", "loss", "margin", "accuracy")
_FUNCTION = ".py:"  # what a user's own function in a file has in its name


def training_facts(context: StageContext) -> dict[str, dict[str, Any]]:
    """`data`, `settings` and `metrics`, from the manifests of the stages before.

    Settings are those that the result depends on, with the values of this iteration. Nothing
    depends on time or on the machine, and no path of it is told.
    """
    here = context.here
    prepared, generated, trained = map(read_manifest, (context.run.data_dir, here.generated, here.train))
    counts = trained.counts if trained else {}
    names = [name for prefix in ("", "heldout_") for name in (prefix + metric for metric in _METRICS)]
    return {
        "data": _data(context.config.data, prepared),
        "settings": {
            **{f"data.{key}": value for key, value in _settings(prepared).items()},
            **_settings(generated),
            **_settings(trained),
        },
        "metrics": {name: _rounded(counts[name]) for name in names if counts.get(name) is not None},
    }


def _data(config: DataConfig, prepared: Manifest | None) -> dict[str, Any]:
    counts = prepared.counts if prepared else {}
    sources = (("train", config.train, config.train_split), ("heldout", config.heldout, config.heldout_split))
    facts: dict[str, Any] = {}
    for name, source, split in sources:
        if source is not None:
            facts[name] = _named(source, split, config)
            facts[f"{name} rows"] = counts.get(name, {}).get("rows")
    return facts


def _named(source: str, split: str, config: DataConfig) -> str:
    """A hub's name in full; of a file or directory of this machine only its own name."""
    if Path(source).expanduser().exists() or not is_hub_id(source):
        return Path(source).name
    parts = [source, config.subset, split, config.revision]
    return ", ".join(part for part in parts if part is not None)


def _settings(manifest: Manifest | None) -> dict[str, Any]:
    """The configuration keys that a stage's result depends on; those that say nothing left out."""
    values: dict[str, Any] = manifest.inputs.get("config", {}) if manifest else {}
    return {
        key: Path(value).name if isinstance(value, str) and _FUNCTION in value else value
        for key, value in values.items()
        if value not in (None, [], {})
    }


def _rounded(value: float) -> float:
    """To six digits; whole numbers as they are."""
    return int(value) if float(value).is_integer() else float(f"{value:.6g}")
