"""What the ranks of the bridge's tests do; plain functions, pickled by name."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from nemo_spin.errors import NemoSpinError


def _build(
    tp_size: int,
    pp_size: int,
    source: Path,
    dtype: str,
    *,
    vocab_multiple: int | None = None,
    ep_size: int = 1,
) -> tuple[list[Any], Any]:
    import torch

    from nemo_spin.bridge.families import architecture_of
    from nemo_spin.config.schema import ModelConfig
    from nemo_spin.megatron import provider, runtime

    sizes = {
        "tensor_model_parallel_size": tp_size,
        "pipeline_model_parallel_size": pp_size,
        "expert_model_parallel_size": ep_size,
    }
    runtime.initialize(**sizes, seed=1, timeout_s=60)
    architecture = architecture_of(source)
    split = tp_size > 1 and architecture.num_experts > 0  # Megatron's experts ask for it
    model = ModelConfig(path=str(source), sequence_parallel=split, **sizes)
    rows_of_vocabulary = provider.padded_vocab_size
    if vocab_multiple is not None:  # as on a GPU
        provider.padded_vocab_size = lambda size, tp: -(-size // (tp * vocab_multiple)) * tp * vocab_multiple
    try:
        chunks = provider.build_model(architecture, model, params_dtype=getattr(torch, dtype))
    finally:
        provider.padded_vocab_size = rows_of_vocabulary
    for parameter in chunks[0].parameters():
        parameter.data.fill_(float("nan"))  # whatever is not loaded shows
    return chunks, architecture


def convert(tp_size: int, pp_size: int, source: Path, target: Path, options: dict[str, Any]) -> Any:
    """Imports `source`, exports to `target`, and passes the gate; returns the manifest."""
    import torch

    from nemo_spin.bridge.export_hf import export_weights, verify_export
    from nemo_spin.bridge.import_hf import load_weights
    from nemo_spin.data.progress import SilentProgress

    dtype = options.get("params_dtype", "float32")
    sizes = {name: options[name] for name in ("vocab_multiple", "ep_size") if name in options}
    chunks, architecture = _build(tp_size, pp_size, source, dtype, **sizes)
    load_weights(chunks, source, architecture)
    manifest = export_weights(
        chunks,
        architecture=architecture,
        source_dir=source,
        out_dir=target,
        dtype=getattr(torch, options["dtype"]) if "dtype" in options else None,
        progress=SilentProgress(),
        extra=options.get("extra"),
        max_shard_bytes=options.get("max_shard_bytes", 20_000),
    )
    verify_export(chunks, target, architecture)
    assert (manifest is None) == (torch.distributed.get_rank() != 0)
    return manifest


def shared_reading(sizes: dict[str, int], source: Path) -> tuple[list[list[Any]], list[list[Any]]]:
    """What every rank reads to import and then to compare; all of them hold `source` in between."""
    import torch

    from nemo_spin.bridge.checkpoint_files import Checkpoint, open_model
    from nemo_spin.bridge.export_hf import compare_placed, verify_export
    from nemo_spin.bridge.import_hf import load_weights
    from nemo_spin.bridge.placement import place

    chunks, architecture = _build(
        sizes.get("tp", 1), sizes.get("pp", 1), source, "float32", ep_size=sizes.get("ep", 1)
    )
    read, regions = Checkpoint.read, []

    def counted(checkpoint: Checkpoint, name: str, region: Any) -> Any:
        regions.append((name, tuple(region)))
        return read(checkpoint, name, region)

    def of_all_ranks() -> list[list[Any]]:
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, list(regions))
        regions.clear()
        return gathered

    Checkpoint.read = counted  # type: ignore[method-assign]
    try:
        load_weights(chunks, source, architecture)
        imported = of_all_ranks()
        verify_export(chunks, source, architecture)
        compared = of_all_ranks()
    finally:
        Checkpoint.read = read  # type: ignore[method-assign]
    compare_placed(place(chunks, architecture), open_model(source, architecture))  # all that this one holds
    return imported, compared


def padded_rows(tp_size: int, source: Path) -> list[float]:
    """Largest absolute values of the rows that pad the embedding and the output layer."""
    import torch

    from nemo_spin.bridge.import_hf import load_weights

    chunks, architecture = _build(tp_size, 1, source, "float32")
    load_weights(chunks, source, architecture)
    largest = []
    for weight in (chunks[0].embedding.word_embeddings.weight, chunks[0].output_layer.weight):
        first = architecture.vocab_size - torch.distributed.get_rank() * weight.shape[0]
        rows = weight[max(0, first) :]
        largest.append(float(rows.abs().max()) if rows.numel() else -1.0)
    values: list[Any] = [None] * tp_size
    torch.distributed.all_gather_object(values, largest)
    return [value for rank_values in values for value in rank_values]


def logits(tp_size: int, source: Path, ids: list[list[int]]) -> Any:
    """[batch, positions, vocabulary] of the imported model, as a numpy array."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    from nemo_spin.bridge.import_hf import load_weights
    from nemo_spin.megatron.vocab_parallel import output_weight

    chunks, architecture = _build(tp_size, 1, source, "float32")
    load_weights(chunks, source, architecture)
    tokens = torch.tensor(ids, device=torch.cuda.current_device())
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        hidden_states = chunks[0](tokens, positions, attention_mask=None)
        if chunks[0].config.sequence_parallel:
            gathered = gather_from_sequence_parallel_region(hidden_states.transpose(0, 1).contiguous())
            hidden_states = gathered.transpose(0, 1)
        own = (hidden_states @ output_weight(chunks[0]).T).contiguous()
        if chunks[0].logit_cap is not None:
            own = chunks[0].logit_cap * torch.tanh(own / chunks[0].logit_cap)
    parts = [torch.empty_like(own) for _ in range(tp_size)]
    torch.distributed.all_gather(parts, own, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)[..., : architecture.vocab_size].cpu().numpy()


def step(model: dict[str, Any], source: Path, table: Any, gradients: Path) -> list[tuple[float, float]]:
    """Scores all rows of `table`, then writes one step's gradients as if they were weights."""
    from functools import partial

    import numpy as np
    import torch

    from nemo_spin.bridge.export_hf import export_weights
    from nemo_spin.bridge.families import architecture_of
    from nemo_spin.bridge.import_hf import load_weights
    from nemo_spin.config.schema import ModelConfig
    from nemo_spin.data.datasets import Units
    from nemo_spin.data.progress import SilentProgress
    from nemo_spin.megatron import provider, runtime
    from nemo_spin.megatron.engine import Engine, layout_of
    from nemo_spin.megatron.forward_step import SPIN_SUMS, spin_loss
    from nemo_spin.megatron.optimizers import build_optimizer, wrap_for_training
    from nemo_spin.objective.objective import build_objective

    config = ModelConfig(path=str(source), micro_batch_tokens=60, **model)
    config.optim.clip_grad = 0.0
    place = runtime.initialize(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        seed=1,
        timeout_s=60,
    )
    architecture = architecture_of(source)
    chunks = provider.build_model(architecture, config, params_dtype=torch.float32)
    load_weights(chunks, source, architecture)
    wrapped = wrap_for_training(chunks, distributed_optimizer=False)
    optimizer = build_optimizer(wrapped, config.optim, lr=1e-3, params_dtype=torch.float32, distributed=False)
    engine = Engine(wrapped, place, architecture.vocab_size, layout_of(config), optimizer)
    units = Units(table)
    everything = np.arange(units.num_units)
    scored = engine.score(units, everything)
    loss = partial(spin_loss, objective=build_objective(loss="logistic", beta=0.1))
    engine.backward(units, everything, loss=loss, names=SPIN_SUMS)
    with torch.no_grad():
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.copy_(parameter.main_grad)
    export_weights(
        chunks, architecture=architecture, source_dir=source, out_dir=gradients, progress=SilentProgress()
    )
    return [scored[row] for row in range(table.num_rows)]


def gate_after_change(tp_size: int, pp_size: int, source: Path, target: Path) -> list[tuple[str, str]]:
    """What every rank's gate says after `target` was changed behind its back."""
    from nemo_spin.bridge.export_hf import verify_export
    from nemo_spin.bridge.import_hf import load_weights

    chunks, architecture = _build(tp_size, pp_size, source, "float32")
    load_weights(chunks, source, architecture)
    return _outcomes(lambda: verify_export(chunks, target, architecture))


def load(tp_size: int, pp_size: int, source: Path, described_by: Path) -> list[tuple[str, str]]:
    """What every rank says to importing a broken directory into a model that another describes."""
    from nemo_spin.bridge.import_hf import load_weights

    chunks, architecture = _build(tp_size, pp_size, described_by, "float32")
    return _outcomes(lambda: load_weights(chunks, source, architecture))


def export_without_room(tp_size: int, source: Path, target: Path, failing_rank: int) -> list[tuple[str, str]]:
    """What every rank says when one of them may not write more than 1 KB into a file."""
    import torch

    from nemo_spin.bridge.export_hf import export_weights
    from nemo_spin.bridge.import_hf import load_weights
    from nemo_spin.data.progress import SilentProgress

    chunks, architecture = _build(tp_size, 1, source, "float32")
    load_weights(chunks, source, architecture)

    def export() -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if torch.distributed.get_rank() == failing_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        try:
            export_weights(
                chunks,
                architecture=architecture,
                source_dir=source,
                out_dir=target,
                progress=SilentProgress(),
            )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return _outcomes(export)


def _outcomes(action: Any) -> list[tuple[str, str]]:
    """(type, message) of what `action` raised on every rank; ("", "") where it did not."""
    import torch

    own = ("", "")
    try:
        action()
    except NemoSpinError as error:
        own = (type(error).__name__, str(error))
    outcomes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, own)
    return outcomes
