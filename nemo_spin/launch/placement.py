"""Which rank a process is, by what its starter says in the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nemo_spin.errors import ConfigError, explain


@dataclass(frozen=True)
class Placement:
    """One rank's place.

    Attributes:
        rank: Of all ranks.
        world_size: Ranks in all.
        local_rank: Among those of its host; also the number of its GPU.
        local_world_size: Ranks of its host.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    def variables(self) -> dict[str, str]:
        """The place as torch and Megatron read it from the environment."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
        }


# Who says it -> names of rank, world size, local rank, local world size. The first that is there
# counts: torchrun inside a Slurm step inherits the step's variables.
_SPEAKERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "mpirun": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}


def of_a_step(environment: Mapping[str, str]) -> Placement:
    """The place of a task of a Slurm step."""
    return _read(environment, "srun")


def of_environment(environment: Mapping[str, str]) -> Placement:
    """The place that torchrun, mpirun or srun gave this process.

    Raises:
        ConfigError: None of them did.
    """
    for speaker, names in _SPEAKERS.items():
        if names[0] in environment and names[1] in environment:
            return _read(environment, speaker)
    raise ConfigError(
        explain(
            "launcher.name=external",
            found="no RANK and WORLD_SIZE in the environment, nor OMPI_COMM_WORLD_… or SLURM_…",
            rule="somebody else starts this command once for each rank, and says which it is",
            remedy="start it with torchrun, mpirun or srun; or use launcher=local or launcher=slurm",
        )
    )


def _read(environment: Mapping[str, str], speaker: str) -> Placement:
    rank, world_size, local_rank, local_size = _SPEAKERS[speaker]
    where = int(environment.get(local_rank, "0"))
    if speaker == "srun":  # such as `8(x2),4`: of all nodes, in order
        sizes = _expand(environment.get(local_size, environment[world_size]))
        node = int(environment.get("SLURM_NODEID", "0"))
        here = sizes[node] if node < len(sizes) else where + 1
    else:
        here = int(environment.get(local_size, str(where + 1)))
    return Placement(int(environment[rank]), int(environment[world_size]), where, here)


def _expand(tasks: str) -> list[int]:
    """Tasks of each node, from Slurm's short form: `2(x3),1` is 2, 2, 2, 1."""
    sizes = []
    for part in tasks.split(","):
        size, _, times = part.partition("(x")
        sizes += [int(size)] * int(times.rstrip(")") or 1)
    return sizes
