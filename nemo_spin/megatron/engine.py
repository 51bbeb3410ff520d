"""Steps over a pipeline: train, validate, score. No loop, no files, no framework.

Whoever drives it (Lightning's trainer, a scoring loop, a test) hands in rows and gets
numbers back; every method is collective: all ranks must call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from nemo_spin.data.datasets import Rows, collated, share_of_rank
from nemo_spin.megatron.forward_step import ForwardStep, LossFunction
from nemo_spin.megatron.runtime import Runtime


@dataclass
class Engine:
    """This rank's share of the model, and how to run rows through it.

    Attributes:
        chunks: Model chunks, wrapped for training or not.
        runtime: This rank's place.
        vocab_size: Size of the vocabulary without padding.
        micro_batch_size: Rows per microbatch.
        optimizer: Needed by `backward` and `update` only.
    """

    chunks: list[Any]
    runtime: Runtime
    vocab_size: int
    micro_batch_size: int
    optimizer: MegatronOptimizer | None = None

    def __post_init__(self) -> None:
        config = self._config
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss if self.optimizer else None

    @property
    def _config(self) -> Any:
        chunk = self.chunks[0]
        return getattr(chunk, "module", chunk).config

    @property
    def _pad_to_multiple(self) -> int:
        return self.runtime.tp_size if self._config.sequence_parallel else 1

    def backward(
        self, rows: Rows, indices: Any, *, loss: LossFunction, names: Sequence[str]
    ) -> dict[str, float]:
        """Gradients of one global batch, in place of those of the last.

        Args:
            rows: The table the batch is drawn from.
            indices: Row indices of the whole global batch, the same on all ranks.
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
        return self._reduce(self._run(rows, indices, loss=loss, forward_only=False), names)

    def update(self, learning_rate: float) -> float:
        """One optimizer step with the gradients of `backward`; returns their global norm."""
        assert self.optimizer is not None, "an engine without optimizer cannot train"
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        _, grad_norm, _ = self.optimizer.step()
        return float(grad_norm) if grad_norm is not None else float(self.optimizer.get_grad_norm())

    @torch.no_grad()
    def evaluate(
        self, rows: Rows, *, batch_rows: int, loss: LossFunction, names: Sequence[str]
    ) -> dict[str, float]:
        """The sums of `loss` over all rows, without gradients; the same on all ranks."""
        total = dict.fromkeys(names, 0.0)
        for start in range(0, rows.num_rows, batch_rows):
            indices = range(start, min(start + batch_rows, rows.num_rows))
            sums = self._reduce(self._run(rows, indices, loss=loss, forward_only=True), names)
            total = {name: total[name] + sums[name] for name in names}
        return total

    @torch.no_grad()
    def score(self, rows: Rows, indices: Any) -> dict[int, list[float]]:
        """Sums of log-probabilities of every response of `indices`.

        Returns:
            Row index -> one value per response, on every rank.
        """
        results = self._run(rows, indices, loss=None, forward_only=True)
        mine: dict[int, list[float]] = {}
        if self.runtime.speaks_for_replica:
            for row_indices, logps in results:
                values = logps.double().reshape(len(row_indices), -1).tolist()
                mine.update({row: v for row, v in zip(row_indices, values, strict=True) if row >= 0})
        gathered: list[Any] = [None] * self.runtime.world_size
        distributed.all_gather_object(gathered, mine)
        return {row: values for part in gathered for row, values in part.items()}

    def _run(self, rows: Rows, indices: Any, *, loss: LossFunction | None, forward_only: bool) -> list[Any]:
        microbatches = share_of_rank(
            torch.as_tensor(indices).numpy(),
            micro_batch_size=self.micro_batch_size,
            dp_rank=self.runtime.dp_rank,
            dp_size=self.runtime.dp_size,
        )
        for chunk in self.chunks:
            chunk.train(not forward_only)
        data = collated(
            rows, microbatches, pad_to_multiple=self._pad_to_multiple, device=self.runtime.device
        )
        outputs: list[Any] = get_forward_backward_func()(
            forward_step_func=ForwardStep(loss, self.vocab_size, self.runtime),
            data_iterator=data,
            model=self.chunks,
            num_microbatches=len(microbatches),
            seq_length=1,  # lengths vary from microbatch to microbatch and travel with the tensors
            micro_batch_size=self.micro_batch_size,
            forward_only=forward_only,
            collect_non_loss_data=loss is None,
        )
        return outputs

    def _reduce(self, outputs: list[Any], names: Sequence[str]) -> dict[str, float]:
        """Sums what the last stages reported over microbatches and replicas."""
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.runtime.device)
        if self.runtime.speaks_for_replica:
            for reported in outputs:
                sums += reported
        distributed.all_reduce(sums)
        return dict(zip(names, sums.tolist(), strict=True))
