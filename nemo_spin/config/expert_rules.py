"""Rules about models whose layers have experts."""

from __future__ import annotations

from nemo_spin.config.mistakes import Mistake, mistake, raise_together
from nemo_spin.config.schema import Config

_KEY = "model.expert_model_parallel_size"


def experts_divide_the_ranks(config: Config) -> list[Mistake]:
    """Experts are shared out over the ranks of a pipeline stage, whatever else these ranks do."""
    model = config.model
    ranks = config.trainer.devices * config.trainer.num_nodes
    of_stage = ranks // model.pipeline_model_parallel_size
    if of_stage % model.expert_model_parallel_size == 0:
        return []
    return [
        mistake(
            _KEY,
            found=f"{model.expert_model_parallel_size}, with {of_stage} ranks in each of "
            f"{model.pipeline_model_parallel_size} pipeline stages",
            rule="the ranks of a stage (tensor x context x data parallel) share its experts evenly",
            remedy=f"set it to a divisor of {of_stage}",
            also=("trainer.devices", "trainer.num_nodes", "model.pipeline_model_parallel_size"),
        )
    ]


def check_experts_fit(config: Config, *, num_experts: int) -> None:
    """Checks that the model's experts can be split as configured.

    Args:
        config: The configuration.
        num_experts: Experts of a layer; 0: the model has none.

    Raises:
        ConfigError: They cannot; the message lists every reason.
    """
    model = config.model
    size = model.expert_model_parallel_size
    mistakes: list[Mistake] = []
    if size > 1 and (not num_experts or num_experts % size):
        has = f"{num_experts} experts in a layer" if num_experts else "no experts"
        mistakes.append(
            mistake(
                _KEY,
                found=f"{size}, and the model has {has}",
                rule="expert-parallel ranks hold the same number of experts each",
                remedy=f"set it to a divisor of {num_experts}" if num_experts else "set it to 1",
            )
        )
    if num_experts and model.tensor_model_parallel_size > 1 and not model.sequence_parallel:
        mistakes.append(
            mistake(
                "model.sequence_parallel",
                found=f"false, with model.tensor_model_parallel_size {model.tensor_model_parallel_size} "
                "and a model with experts",
                rule="tensor-parallel ranks send different tokens to the experts",
                remedy="set it to true",
            )
        )
    if num_experts and model.fp8 is not None:
        mistakes.append(
            mistake(
                "model.fp8",
                found=f"{model.fp8}, and the model has experts",
                rule="the tokens of an expert are of no fixed number, 8-bit products want multiples of 16",
                remedy="set it to null",
            )
        )
    parts = model.recompute_modules if model.recompute_granularity == "selective" else []
    if num_experts and "mlp" in parts:
        mistakes.append(
            mistake(
                "model.recompute_modules",
                found=f"{parts}, and the model has experts",
                rule="Megatron computes a dense MLP again, and keeps what experts computed",
                remedy="leave mlp out, or set model.recompute_granularity to full",
            )
        )
    raise_together(mistakes)
