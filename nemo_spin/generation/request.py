"""What the sampler's process is asked to do: the contents of `request.json`.

The process reads this file and the prepared rows, and writes shards; nothing else passes
between it and the command that started it, so any machine that sees the run directory
can do a part of the work.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemo_spin.generation.engine import Sampling
from nemo_spin.generation.leases import LeaseSettings

REQUEST_NAME = "request.json"


@dataclass(frozen=True)
class EngineSettings:
    """How the model is loaded.

    Attributes:
        name: Which engine (`generation.engine`).
        model_dir: Hugging Face directory.
        dtype: float32 | bfloat16 | float16 | auto (bfloat16 on a GPU, float32 on a CPU).
        tensor_parallel_size: Devices (on CPU: processes) that share the model.
        max_model_len: Tokens of the longest prompt and its answer.
        max_num_seqs: Answers drawn at the same time, at most.
        kv_cache_bytes: Memory for keys and values on each device; None: the engine's
            own choice on a GPU, and on a CPU what `capacity.kv_cache_bytes` says.
        kv_numbers_per_token: Numbers kept for a token on each device.
        vocab_size: Rows of the embedding.
        model_sha256: Hash of the model: an engine that has it needs no other weights.
        server: Address of the server that has the model; None: this is not a server's.
        adapter_dir: Adapter beside `model_dir`, which together are the model; None: none.
        max_adapter_rank: Of any adapter the engine will be given; 0: it takes none, but other weights.
        adapter_modules: The last parts of the names of the linear layers that adapters stand beside.
        server_timeout_s: Seconds that a call to the server may take; None: without a server.
        neighbours: Engines like it on its machine, itself included: on a CPU they share cores and memory.
    """

    name: str
    model_dir: str
    dtype: str
    tensor_parallel_size: int
    max_model_len: int
    max_num_seqs: int
    kv_cache_bytes: int | None
    kv_numbers_per_token: int
    vocab_size: int
    model_sha256: str
    server: str | None = None
    adapter_dir: str | None = None
    max_adapter_rank: int = 0
    adapter_modules: tuple[str, ...] = ()
    server_timeout_s: float | None = None
    neighbours: int = 1

    @property
    def weights_dir(self) -> str:
        """What tells the model from others: its adapter, or its directory; for messages."""
        return self.adapter_dir or self.model_dir

    def fits(self, other: EngineSettings) -> bool:
        """Whether an engine with these settings answers like one with `other`, given its weights."""
        if self.max_adapter_rank and self.model_dir != other.model_dir:
            return False
        given = replace(
            self,
            model_dir=other.model_dir,
            adapter_dir=other.adapter_dir,
            model_sha256=other.model_sha256,
        )
        return given == other


@dataclass(frozen=True)
class CanaryCheck:
    """What the engine is asked before it answers prompts (`canary.py`).

    Attributes:
        path: The canary of the model.
        tolerance: Mean absolute difference from it, nats per token; None: by its precision.
    """

    path: str
    tolerance: float | None


@dataclass(frozen=True)
class ShardPlan:
    """Rows `start` to `start + rows` of a pass's prepared file, and the file of their answers."""

    file: str
    start: int
    rows: int


@dataclass(frozen=True)
class Pass:
    """One way to answer one set of prompts; an engine serves several.

    Attributes:
        name: Begins the names of its shards.
        prepared: Parquet file with the prepared rows.
        sampling: How answers are drawn.
        num_generations: Answers for each row.
        seed: `seed` of the configuration.
        iteration: Number of the iteration; a column of the answers.
        opponent_sha256: Hash of the model; a column of the answers.
        shards: All of the pass's shards, in order.
    """

    name: str
    prepared: str
    sampling: Sampling
    num_generations: int
    seed: int
    iteration: int
    opponent_sha256: str
    shards: tuple[ShardPlan, ...]


@dataclass(frozen=True)
class GenerationRequest:
    """All that a sampler's process is asked to do at once.

    Attributes:
        engine: How the model is loaded, once for all passes, unless the process has it already.
        passes: What is answered. Shards that exist are left as they are.
        out_dir: Where the shards go.
        progress_path: The file the command on the user's terminal follows.
        status_path: The file the watchdog follows (`status.py`).
        log_path: Where the process's output goes.
        canary: How the engine's weights are checked; None: not.
        order: The names of all shards, in the order in which they are done; none: as in the passes.
        leases: How shards are shared with other processes that have the same passes; None: there are none.
    """

    engine: EngineSettings
    passes: tuple[Pass, ...]
    out_dir: str
    progress_path: str
    status_path: str
    log_path: str
    canary: CanaryCheck | None
    order: tuple[str, ...] = ()
    leases: LeaseSettings | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> GenerationRequest:
        """The inverse of `to_dict`."""
        return cls(
            **{
                **plain,
                "engine": engine_from_dict(plain["engine"]),
                "passes": tuple(_pass(entry) for entry in plain["passes"]),
                "canary": None if plain["canary"] is None else CanaryCheck(**plain["canary"]),
                "order": tuple(plain["order"]),
                "leases": None if plain["leases"] is None else LeaseSettings(**plain["leases"]),
            }
        )


def read_request(path: Path) -> GenerationRequest:
    """The request in `path`, as `stage` wrote it."""
    return GenerationRequest.from_dict(json.loads(path.read_text(encoding="utf-8"))["request"])


def engine_from_dict(plain: dict[str, Any]) -> EngineSettings:
    """Settings from the plain values that were written."""
    return EngineSettings(**{**plain, "adapter_modules": tuple(plain["adapter_modules"])})


def _pass(plain: dict[str, Any]) -> Pass:
    sampling = {**plain["sampling"], "stop_token_ids": tuple(plain["sampling"]["stop_token_ids"])}
    shards = tuple(ShardPlan(**entry) for entry in plain["shards"])
    return Pass(**{**plain, "sampling": Sampling(**sampling), "shards": shards})
