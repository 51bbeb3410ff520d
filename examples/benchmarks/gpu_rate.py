"""The rate at which this card multiplies large bf16 matrices: what shares of a peak are taken of."""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch


def main(tiny: bool) -> None:
    """Prints the card's name and its rate in FLOP/s: the median of ten products after three."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    size = 128 if tiny else 8192
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(13):
        if has_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        left @ right
        if has_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    name = torch.cuda.get_device_name() if has_gpu else "CPU"
    print(json.dumps({"name": name, "flops": 2 * size**3 / statistics.median(seconds[3:])}))


if __name__ == "__main__":
    main("--tiny" in sys.argv)
