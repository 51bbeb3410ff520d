"""What an interrupted stage left behind: kept where it fits, refused or made again where not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_spin.data.files import remove_partials, write_json
from nemo_spin.data.progress import Progress
from nemo_spin.errors import ConfigError, explain
from nemo_spin.generation.request import REQUEST_NAME, GenerationRequest, Pass
from nemo_spin.generation.shards import PreparedRows, shard_damage

_ABSENT = object()


def write_request(request: GenerationRequest, inputs: Mapping[str, Any]) -> Path:
    """Writes `request.json`, unless the directory was begun with other inputs.

    How rows are cut into shards, where files lie and how the model is held may differ:
    they change no answer.

    Args:
        request: What is going to be asked.
        inputs: What the stage's result depends on, besides how answers are drawn.

    Raises:
        ConfigError: The directory was begun with other inputs; the message shows each.
    """
    path = Path(request.out_dir) / REQUEST_NAME
    today = _identity(request, inputs)
    before = _read_identity(path)
    differing = [] if before is None else list(_differences(before, today))
    if differing:
        raise ConfigError(
            explain(
                request.out_dir,
                found="was begun with other inputs\n    " + "\n    ".join(differing),
                rule="a stage goes on only with the inputs it was begun with",
                remedy=f"set them back, give another run_dir, or begin it again: rm -r {request.out_dir}",
            )
        )
    write_json(path, {"inputs": today, "request": request.to_dict()})
    return path


def keep_sound_shards(request: GenerationRequest, progress: Progress) -> int:
    """Removes all shards that are damaged or not asked for; returns how many are missing.

    Args:
        request: What is asked for.
        progress: Told what was kept and what has to be made again.
    """
    out_dir = Path(request.out_dir)
    remove_partials(out_dir)
    planned = {
        shard.file: (generation, shard) for generation in request.passes for shard in generation.shards
    }
    kept = 0
    readers: dict[str, PreparedRows] = {}
    for path in sorted(out_dir.glob("*-shard-*.parquet")):
        if path.name not in planned:
            path.unlink()  # of another number of shards
            continue
        generation, shard = planned[path.name]
        prepared = readers.setdefault(generation.prepared, PreparedRows(Path(generation.prepared)))
        damage = shard_damage(path, shard, generation, prepared)
        if damage is None:
            kept += 1
        else:
            path.unlink()
            progress.note(f"{path.name} {damage}: it is made again")
    if 0 < kept < len(planned):
        progress.note(f"{kept} of {len(planned)} shards are there already")
    return len(planned) - kept


def _identity(request: GenerationRequest, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides about the answers, as JSON gives it back."""
    passes = {generation.name: _pass_identity(generation) for generation in request.passes}
    plain: dict[str, Any] = json.loads(json.dumps({**inputs, "passes": passes}))
    return plain


def _pass_identity(generation: Pass) -> dict[str, Any]:
    sampling = generation.sampling
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "num_generations": generation.num_generations,
        "seed": generation.seed,
        "iteration": generation.iteration,
        "model_sha256": generation.opponent_sha256,
        "prompts": sum(shard.rows for shard in generation.shards),
    }


def _read_identity(path: Path) -> dict[str, Any] | None:
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))["inputs"]
    except (OSError, ValueError, TypeError, KeyError):
        return None  # not there, or of no use: the shards themselves are checked all the same
    return identity if isinstance(identity, dict) else None


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    before, today = dict(_leaves(was, "")), dict(_leaves(now, ""))
    for key in sorted(before.keys() | today.keys()):
        if before.get(key, _ABSENT) != today.get(key, _ABSENT):
            yield f"{key}: was {_shown(before.get(key, _ABSENT))}, is {_shown(today.get(key, _ABSENT))}"


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, below in value.items():
            # The keys of the configuration are known without the section that holds them here.
            yield from _leaves(below, f"{key}.{name}" if key and key != "config" else str(name))
    else:
        yield key, value


def _shown(value: Any) -> str:
    return "not there" if value is _ABSENT else json.dumps(value, ensure_ascii=False)[:80]
