"""How a stage came to its engine: in the stage's line on the screen, and in metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_spin.data.files import Manifest

_WAYS = {
    "started": "engine started in {seconds:.1f} s",
    "refreshed": "new weights into the running engine in {seconds:.2f} s",
    "adapted": "adapter into the running engine in {seconds:.2f} s",
    "kept": "engine kept",
}


def write_engine_line(path: Path, manifest: Manifest, *, step: int) -> None:
    """Appends a line to an iteration's metrics, if an engine was used.

    Args:
        path: metrics.jsonl.
        manifest: Of the stage.
        step: The last optimizer step before the weights that answered; -1: none was made yet.
            A training that goes on drops the lines of later steps, and no others.
    """
    engine = manifest.notes.get("engine")
    if engine is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"split": "engine", "stage": manifest.stage, "step": step, **engine}) + "\n")


def describe_engine(manifest: Manifest) -> str:
    """Such as `; engine started in 9.3 s`; empty where no engine was used."""
    engine = manifest.notes.get("engine")
    if engine is None:
        return ""
    words = _WAYS[engine["way"]].format(seconds=engine["seconds"])
    if "canary_difference" in engine:
        words += f" (canary: {engine['canary_difference']:.1e} nats per token)"
    return f"; {words}"
