"""Steps over a pipeline: train, validate, score. No loop, no files, no framework.

Whoever drives it (Lightning's trainer, a scoring loop, a test) hands in units and gets
numbers back; every method is collective: all ranks must call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import distributed

from nemo_spin.config.schema import ModelConfig
from nemo_spin.data.context import row_multiple, share_of
from nemo_spin.data.datasets import Units
from nemo_spin.data.packing import Layout, Microbatch, of_one_shape
from nemo_spin.megatron import cpu
from nemo_spin.megatron.forward_step import ForwardStep, LossFunction, row_logps
from nemo_spin.megatron.fp8 import row_alignment
from nemo_spin.megatron.meter import Meter
from nemo_spin.megatron.runtime import Runtime


def layout_of(model: ModelConfig) -> Layout:
    """How `model` wants units laid out."""
    return Layout(model.packing, model.micro_batch_tokens, model.micro_batch_size)


@dataclass
class Engine:
    """This rank's share of the model, and how to run units through it.

    Attributes:
        chunks: Model chunks, wrapped for training or not.
        runtime: This rank's place.
        vocab_size: Size of the vocabulary without padding.
        layout: How units become microbatches.
        optimizer: Needed by `backward` and `update` only.
        meter: Times the collating of microbatches and counts their positions.
    """

    chunks: list[Any]
    runtime: Runtime
    vocab_size: int
    layout: Layout
    optimizer: MegatronOptimizer | None = None
    meter: Meter = field(default_factory=Meter)

    def __post_init__(self) -> None:
        config = self._config
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss if self.optimizer else None
        if self._overlaps("overlap_grad_reduce"):  # gradients are sent in the last backward pass only
            waits = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = waits if len(waits) > 1 else waits[0]
        multiple = row_multiple(
            tp_size=self.runtime.tp_size if config.sequence_parallel else 1,
            cp_size=self.runtime.cp_size,
            alignment=row_alignment(config),
        )
        self.layout = replace(self.layout, pad_to_multiple=multiple)
        if self.runtime.device.type == "cpu":
            cpu.keep_freed_memory()  # from here on: what loading the weights took is given back

    @property
    def _config(self) -> Any:
        chunk = self.chunks[0]
        return getattr(chunk, "module", chunk).config

    def backward(
        self, units: Units, indices: np.ndarray, *, loss: LossFunction, names: Sequence[str]
    ) -> dict[str, float]:
        """Gradients of one global batch, in place of those of the last.

        Args:
            units: The table the batch is drawn from.
            indices: Units of the whole global batch, the same on all ranks.
            loss: What is summed.
            names: Names of the sums that `loss` reports.

        Returns:
            The sums over the global batch, the same on all ranks.
        """
        assert self.optimizer is not None, "an engine without optimizer cannot train"
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._reduce(self._run(units, indices, loss=loss, forward_only=False), names)

    def update(self, learning_rate: float) -> float:
        """One optimizer step with the gradients of `backward`; returns their global norm."""
        assert self.optimizer is not None, "an engine without optimizer cannot train"
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        _, grad_norm, _ = self.optimizer.step()
        return float(grad_norm) if grad_norm is not None else float(self.optimizer.get_grad_norm())

    def settle(self) -> None:
        """Completes weights that the next forward pass would gather. All ranks must call.

        Whoever reads weights otherwise than by a forward pass calls it first.
        """
        if self._overlaps("overlap_param_gather"):
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def _overlaps(self, what: str) -> bool:
        settings = getattr(self.chunks[0], "ddp_config", None)  # None: not wrapped for training
        return settings is not None and bool(getattr(settings, what))

    @torch.no_grad()
    def evaluate(
        self, units: Units, *, batch_units: int, loss: LossFunction, names: Sequence[str]
    ) -> dict[str, float]:
        """The sums of `loss` over all units, without gradients; the same on all ranks."""
        total = dict.fromkeys(names, 0.0)
        for start in range(0, units.num_units, batch_units):
            indices = np.arange(start, min(start + batch_units, units.num_units))
            sums = self._reduce(self._run(units, indices, loss=loss, forward_only=True), names)
            total = {name: total[name] + sums[name] for name in names}
        return total

    @torch.no_grad()
    def score(self, units: Units, indices: np.ndarray) -> dict[int, tuple[float, float]]:
        """Sums of log-probabilities of the real and the generated response of each row.

        Returns:
            Row of the table -> (real, generated), for all rows of `indices`, on every rank.
        """
        results = self._run(units, indices, loss=None, forward_only=True)
        mine: dict[int, tuple[float, float]] = {}
        if self.runtime.speaks_for_replica:
            for microbatch, logps in results:
                mine.update(row_logps(microbatch, logps))
        gathered: list[Any] = [None] * self.runtime.world_size
        distributed.all_gather_object(gathered, mine)
        return {row: values for part in gathered for row, values in part.items()}

    def _run(
        self, units: Units, indices: np.ndarray, *, loss: LossFunction | None, forward_only: bool
    ) -> list[Any]:
        with self.meter.collating():
            microbatches = self.layout.microbatches(
                units, np.asarray(indices), dp_rank=self.runtime.dp_rank, dp_size=self.runtime.dp_size
            )
            microbatches += [[-1]] * (self._most(len(microbatches)) - len(microbatches))
            interleaved = len(self.chunks) > 1
            if interleaved:  # its schedule takes whole groups of microbatches
                microbatches += [[-1]] * (-len(microbatches) % self.runtime.pp_size)
            collated: Iterable[Microbatch] = (self.layout.collate(units, chosen) for chosen in microbatches)
            rows, length = 1, 1  # lengths vary from microbatch to microbatch and travel with the tensors
            if interleaved:
                collated = of_one_shape(list(collated))
                rows, length = collated[0].input_ids.shape
        for chunk in self.chunks:
            chunk.train(not forward_only)
        shares = [self._shares(collated) for _ in self.chunks]
        data = [self.meter.watch(each, counts=chunk == 0) for chunk, each in enumerate(shares)]
        outputs: list[Any] = get_forward_backward_func()(
            forward_step_func=ForwardStep(loss, self.vocab_size, self.runtime),
            data_iterator=data if interleaved else data[0],
            model=self.chunks,
            num_microbatches=len(microbatches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
            collect_non_loss_data=loss is None,
        )
        return outputs

    def _most(self, count: int) -> int:
        """The most microbatches of any replica, where replicas exchange tokens between their experts."""
        if self.runtime.ep_size == 1:
            return count
        most = torch.tensor(count, device=self.runtime.device)
        distributed.all_reduce(most, op=distributed.ReduceOp.MAX, group=self.runtime.dp_group)
        return int(most)

    def _shares(self, collated: Iterable[Microbatch]) -> Iterator[Microbatch]:
        """This rank's share of each microbatch, when a schedule asks for it."""
        for whole in collated:
            share = share_of(whole, cp_rank=self.runtime.cp_rank, cp_size=self.runtime.cp_size)
            yield share.to(self.runtime.device)

    def _reduce(self, outputs: list[Any], names: Sequence[str]) -> dict[str, float]:
        """Sums what the last stages reported over microbatches and replicas."""
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.runtime.device)
        if self.runtime.speaks_for_replica:
            for reported in outputs:
                sums += reported
        distributed.all_reduce(sums)
        return dict(zip(names, sums.tolist(), strict=True))
