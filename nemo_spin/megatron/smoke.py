"""`python -m nemo_spin.megatron.smoke`: one rank of a small collective, to see that collectives work.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say who and where; the first rank prints
the backend and the seconds that one all-reduce took once the ranks had met.
"""

from __future__ import annotations

import datetime
import os
import sys
import time

import torch
from torch import distributed

_ELEMENTS = 1 << 20
_TIMEOUT_S = 30.0


def main() -> None:
    """Adds up the ranks' numbers and compares."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    has_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= world_size
    device = torch.device("cpu")
    if has_gpus:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if has_gpus else "gloo"
    distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=_TIMEOUT_S))
    values = torch.full((_ELEMENTS,), float(rank + 1), device=device)
    distributed.barrier()
    start = time.perf_counter()
    distributed.all_reduce(values)
    total, expected = float(values[-1]), world_size * (world_size + 1) / 2
    seconds = time.perf_counter() - start
    assert total == expected, f"the sum over {world_size} ranks is {total}, not {expected}"
    if rank == 0:
        size = values.numel() * values.element_size()
        sys.stdout.write(f"{backend}, {size / 1e6:.0f} MB in {seconds * 1e3:.0f} ms\n")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
