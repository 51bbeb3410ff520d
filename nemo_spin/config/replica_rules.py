"""Several samplers need devices of their own, and an engine each."""

from __future__ import annotations

from nemo_spin.config.mistakes import Mistake, mistake
from nemo_spin.config.schema import Config

REPLICA_KEYS = (
    "generation.replicas",
    "generation.tensor_parallel_size",
    "generation.engine",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
)


def samplers_have_devices(config: Config) -> list[Mistake]:
    """A sampler's GPUs are on one node, and nobody else's; a server is one sampler, and has its own.

    How many GPUs there are is known here where `trainer.accelerator` says that there are any.
    """
    generation, trainer = config.generation, config.trainer
    replicas, size = generation.replicas, generation.tensor_parallel_size
    if replicas == 1:
        return []
    if generation.engine == "vllm_server":
        return [
            mistake(
                "generation.replicas",
                found=f"{replicas}, with generation.engine vllm_server",
                rule="one client asks the server, for up to generation.max_num_seqs answers at a time",
                remedy="set it to 1, and spread the server over its devices where it is started",
                also=("generation.engine",),
            )
        ]
    room = trainer.num_nodes * (trainer.devices // size)
    if trainer.accelerator != "gpu" or replicas <= room:
        return []
    return [
        mistake(
            "generation.replicas",
            found=f"{replicas} x generation.tensor_parallel_size {size}, with trainer.num_nodes "
            f"{trainer.num_nodes} x trainer.devices {trainer.devices}",
            rule="every sampler has GPUs of its own, all on one node",
            remedy=f"set it to {max(1, room)}" + ("" if room else ", and lower the tensor-parallel size"),
            also=REPLICA_KEYS[1:],
        )
    ]
