"""Overlap that has nothing to overlap is refused."""

from __future__ import annotations

from tests.unit.config.test_validate import accepted, refused

GRADIENTS, WEIGHTS = "model.overlap_grad_reduce=true", "model.overlap_param_gather=true"
ADAM = "model.optim.name=adam"


def test_gradients_overlap_with_any_optimizer() -> None:
    accepted(GRADIENTS)
    accepted(GRADIENTS, ADAM, "model.use_distributed_optimizer=true")


def test_weights_are_gathered_by_the_distributed_optimizer_in_the_buckets_of_gradients() -> None:
    accepted(GRADIENTS, WEIGHTS, ADAM, "model.use_distributed_optimizer=true")
    message = refused(GRADIENTS, WEIGHTS, "model.use_distributed_optimizer=false")
    assert "model.overlap_param_gather: true, with model.use_distributed_optimizer false" in message
    assert "set model.overlap_grad_reduce to true" in refused(WEIGHTS, ADAM)
