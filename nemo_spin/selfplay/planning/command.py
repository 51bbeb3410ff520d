"""What `nemo-spin plan` does with its arguments."""

from __future__ import annotations

import json
from collections.abc import Sequence

from omegaconf import MISSING
from rich.console import Console

from nemo_spin.config.load import load_config
from nemo_spin.errors import ConfigError, explain
from nemo_spin.megatron.sizes import Cluster
from nemo_spin.selfplay.planning.model import read_model
from nemo_spin.selfplay.planning.plan import Plan, make_plan
from nemo_spin.selfplay.planning.request import Lengths, count, make_request, read_device
from nemo_spin.selfplay.planning.show import as_json, render

_WIDTH = 150  # of tables that go into a file


def plan(
    source: str | None,
    overrides: Sequence[str],
    *,
    model: str | None,
    nodes: int | None,
    gpus_per_node: int | None,
    gpu: str,
    pairs: int,
    lengths: Lengths,
) -> Plan:
    """Plans for a configuration and what the command line adds.

    Args:
        source, overrides: As of every command.
        model: Directory, config.json or hub id; None: model.path.
        nodes, gpus_per_node: None: trainer.num_nodes and trainer.devices.
        gpu: A kind or its numbers, see `read_device`.
        pairs: Prompts times generations of an iteration.
        lengths: Mean tokens.

    Raises:
        ConfigError: A setting cannot be used, or nothing fits.
        CheckpointError: There is no such model, or it is not known.
    """
    config = load_config(source, overrides)
    path = model if model is not None else config.model.path
    if path == MISSING:
        raise ConfigError(
            explain(
                "model.path",
                found="is not set",
                rule="a plan is for a model",
                remedy="give --model PATH: a Hugging Face directory, a config.json or a hub id",
            )
        )
    cluster = Cluster(
        nodes=count("--nodes", config.trainer.num_nodes if nodes is None else nodes, most=10_000),
        gpus_per_node=count(
            "--gpus-per-node", config.trainer.devices if gpus_per_node is None else gpus_per_node, most=256
        ),
        device=read_device(gpu),
    )
    request = make_request(
        config, overrides, cluster=cluster, pairs=count("--pairs", pairs, most=10**9), lengths=lengths
    )
    return make_plan(read_model(path), request)


def written(made: Plan, *, as_data: bool) -> str:
    """The plan as text: tables, or JSON."""
    if as_data:
        return json.dumps(as_json(made), indent=2)
    console = Console(width=max(_WIDTH, Console().width))
    with console.capture() as capture:
        console.print(render(made), soft_wrap=False)
    return capture.get().rstrip("\n")
