"""Where the processes of several samplers run: on this machine each on GPUs of its own.

A launcher of a cluster gives another `Place`, such as one whose `prefix` is `srun` on one node.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nemo_spin.errors import ConfigError, explain

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_NVIDIA = Path("/proc/driver/nvidia/gpus")  # one directory for each GPU


@dataclass(frozen=True)
class Placement:
    """How one process is started.

    Attributes:
        prefix: Words before its command, such as those of `srun`, which passes on its input and signals.
        environment: Variables besides this process's.
        is_child: Whether the process itself is a child of this one; its end is tied to ours then.
        neighbours: Samplers on its machine, itself included.
    """

    prefix: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    is_child: bool = True
    neighbours: int = 1


HERE = Placement()
Place = Callable[[int], Placement]


def on_this_machine(*, replicas: int, tensor_parallel_size: int) -> Place:
    """Places samplers side by side: replica i on the i-th group of the visible GPUs.

    Args:
        replicas: How many there are. One alone keeps all that is visible.
        tensor_parallel_size: GPUs of each.

    Raises:
        ConfigError: There are GPUs, but too few.
    """
    devices = _visible_devices()
    if devices and replicas * tensor_parallel_size > len(devices):
        raise ConfigError(
            explain(
                "generation.replicas",
                found=f"{replicas} x generation.tensor_parallel_size {tensor_parallel_size}, and "
                f"{len(devices)} GPUs are visible here",
                rule="every sampler has GPUs of its own",
                remedy=f"set it to {max(1, len(devices) // tensor_parallel_size)} at most",
            )
        )

    def place(index: int) -> Placement:
        first = index * tensor_parallel_size
        mine = devices[first : first + tensor_parallel_size] if replicas > 1 else ()
        return Placement(environment={_VISIBLE: ",".join(mine)} if mine else {}, neighbours=replicas)

    return place


def _visible_devices() -> tuple[str, ...]:
    """The names of the GPUs that CUDA would show us; none on a machine without."""
    named = os.environ.get(_VISIBLE)
    if named is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip())
    try:
        return tuple(str(number) for number, _ in enumerate(_NVIDIA.iterdir()))
    except OSError:
        return ()
