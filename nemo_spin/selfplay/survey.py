"""Compares what lies in a run directory with what today's configuration would make."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_spin.selfplay.inputs import Difference, differences, plain, refuse
from nemo_spin.selfplay.stages import Stage
from nemo_spin.selfplay.stages.generate import GenerateStage


def refuse_other_inputs(stages: Sequence[Stage]) -> None:
    """Refuses to go on where a finished or begun stage was made from other inputs.

    As long as stages are done and equal, all their inputs are compared; behind the first
    that is not, configuration keys alone (what the later ones consume is not made yet, or
    differs for the cause that was found already).

    Args:
        stages: In the order they run.

    Raises:
        ConfigError: Something differs; the message lists every difference and what to remove.
        DataError: The files of a finished stage are damaged.
    """
    found: list[Difference] = []
    redo: list[Stage] = []
    all_before_hold, redo_consumed = True, False
    for stage in stages:
        different = _differences(stage, keys_only=not all_before_hold)
        found += different
        if different or redo_consumed:
            redo.append(stage)
        if stage.consumed:
            redo_consumed = redo_consumed or bool(different)
            all_before_hold = all_before_hold and not different and stage.manifest() is not None
    if found:
        raise refuse(stages[0].context.run.path, found, _leftovers(redo))


def _leftovers(stages: Sequence[Stage]) -> list[Path]:
    """What to remove so that `stages` are done again; an iteration as a whole where all of it goes."""
    whole = {stage.files.path for stage in stages if stage.name == GenerateStage.name and stage.iteration}
    paths: dict[Path, None] = {}
    for stage in stages:
        for path in [stage.files.path] if stage.files.path in whole else stage.leftovers():
            if path.exists():
                paths[path] = None
    return list(paths)


def _differences(stage: Stage, *, keys_only: bool) -> list[Difference]:
    was = _recorded_inputs(stage)
    if was is None:
        return []
    if keys_only:
        was, now = {"config": was.get("config", {})}, plain({"config": stage.settings()})
    else:
        now = stage.inputs()
    return differences(stage.label, was, now, prefix=stage.key_prefix)


def _recorded_inputs(stage: Stage) -> dict[str, Any] | None:
    """What a finished stage was made from, or what an unfinished one is being made from."""
    manifest = stage.manifest()
    if manifest is not None:
        return dict(plain(manifest.inputs))
    if not stage.directory.exists():
        return None
    try:
        return dict(json.loads(stage.inputs_path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
