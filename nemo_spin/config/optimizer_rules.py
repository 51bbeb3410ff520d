"""Where Megatron can move the optimizer to the CPU."""

from __future__ import annotations

from nemo_spin.config.mistakes import Mistake, mistake
from nemo_spin.config.schema import Config

_KEY = "model.optimizer_cpu_offload"
OFFLOADING_KEYS = (
    _KEY,
    "model.optim.name",
    "model.use_distributed_optimizer",
    "trainer.accelerator",
    "trainer.precision",
)


def offloading_is_for_a_sharded_adam_on_gpus(config: Config) -> list[Mistake]:
    """Megatron's offloading optimizer is an Adam that keeps main weights for a distributed optimizer."""
    model, trainer = config.model, config.trainer
    if not model.optimizer_cpu_offload:
        return []
    hindrances = (
        (
            model.optim.name != "adam",
            "model.optim.name",
            model.optim.name,
            "Megatron offloads Adam alone",
            "choose model/optim=adam",
        ),
        (
            model.use_distributed_optimizer is False,
            "model.use_distributed_optimizer",
            "false",
            "Megatron offloads the state of the distributed optimizer alone",
            "set model.use_distributed_optimizer to null",
        ),
        (
            trainer.accelerator == "cpu",
            "trainer.accelerator",
            "cpu",
            "there is nothing to move: the state is on the CPU already",
            "train on GPUs",
        ),
        (
            trainer.precision == "32",
            "trainer.precision",
            "32",
            "what is offloaded are the float32 copies of bf16 weights and their state",
            "set trainer.precision to bf16",
        ),
    )
    return [
        mistake(
            _KEY,
            found=f"true, with {key} {value}",
            rule=rule,
            remedy=f"set it to false, or {remedy}",
            also=(key,),
        )
        for hinders, key, value, rule, remedy in hindrances
        if hinders
    ]
