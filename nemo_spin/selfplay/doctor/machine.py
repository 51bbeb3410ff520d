"""GPUs and their links, the CPU's cores and memory, shared memory and the disk of the run directory."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import time
from pathlib import Path

from nemo_spin.selfplay.doctor.finding import Finding, output_of

_GIB = 1024**3
_PROBE_BYTES = 128 << 20  # written and synced once
_LEAST_SHARED_MEMORY = 1 * _GIB
_SHARED_MEMORY = Path("/dev/shm")
_QUERY = "--query-gpu=name,memory.total,driver_version"
_TIMEOUT_S = 30.0


def examine_machine(directory: Path, *, writes: bool) -> list[Finding]:
    """What a run would find on this machine.

    Args:
        directory: Where the run directory is to be.
        writes: Whether its disk may be written to, or what there is above it.
    """
    gpus = _gpus()
    findings = [*gpus, _processor(), _shared_memory(has_gpu=len(gpus) > 1)]
    return [*findings, disk(directory)] if writes else findings


def _gpus() -> list[Finding]:
    listed = output_of(["nvidia-smi", _QUERY, "--format=csv,noheader"], timeout_s=_TIMEOUT_S)
    if not listed:
        return [Finding("GPUs", "none (no nvidia-smi that answers): everything runs on the CPU")]
    rows = [tuple(part.strip() for part in line.split(",")) for line in listed.splitlines() if line.strip()]
    kinds = {row: rows.count(row) for row in rows}
    text = "; ".join(
        f"{count} x {name}, {memory}, driver {driver}" for (name, memory, driver), count in kinds.items()
    )
    problem = _obstacle_of_torch()
    findings = [Finding("GPUs", text, "error" if problem else "ok", problem)]
    links = output_of(["nvidia-smi", "topo", "-m"], timeout_s=_TIMEOUT_S)
    if len(rows) > 1 and links:
        has_nvlink = any(word.startswith("NV") and word[2:].isdigit() for word in links.split())
        findings.append(
            Finding("links", "NVLink")
            if has_nvlink
            else Finding(
                "links",
                "no NVLink between the GPUs",
                "warning",
                "prefer pipeline to tensor parallelism (nemo-spin plan --gpu ... compares)",
            )
        )
    return [*findings, _nccl()]


def _obstacle_of_torch() -> str:
    """Why PyTorch cannot use the GPUs, and what to do; empty where it can, or is not installed."""
    if importlib.util.find_spec("torch") is None:
        return ""
    import torch

    if torch.cuda.is_available():
        return ""
    build = f"torch {torch.__version__} is built for {torch.version.cuda or 'CPUs alone'}"
    return f"{build} and cannot use them: install a build that fits the driver"


def _nccl() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("NCCL", "not usable", "error", "see GPUs")
    return Finding("NCCL", ".".join(map(str, torch.cuda.nccl.version())))


def _processor() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB
    return Finding("CPU", f"{usable} cores, {memory:.0f} GiB of memory")


def _shared_memory(*, has_gpu: bool) -> Finding:
    if not _SHARED_MEMORY.exists():
        return Finding(
            "/dev/shm", "not there", "warning", "ranks and data loaders exchange tensors through it"
        )
    total = shutil.disk_usage(_SHARED_MEMORY).total
    text = f"{total / _GIB:.1f} GiB"
    if has_gpu and total < _LEAST_SHARED_MEMORY:
        remedy = "start the container with --ipc=host or --shm-size=16g: NCCL's ranks meet there"
        return Finding("/dev/shm", text, "error", remedy)
    return Finding("/dev/shm", text)


def disk(directory: Path) -> Finding:
    """Free space, and how fast a file becomes durable where a run directory is to be."""
    place = directory.absolute()
    while not place.is_dir():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            block = os.urandom(1 << 20)  # not zeros, which some file systems do not store
            start = time.perf_counter()
            for _ in range(_PROBE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - start
    except OSError as error:
        return Finding(
            "disk",
            f"{place} cannot be written to ({error.strerror or error})",
            "error",
            "mend the permissions or free some space, or choose another run_dir",
        )
    free, speed = shutil.disk_usage(place).free / 1e9, _PROBE_BYTES / seconds / 1e6
    return Finding("disk", f"{place}: {free:,.0f} GB free, {speed:,.0f} MB/s written and synced")
