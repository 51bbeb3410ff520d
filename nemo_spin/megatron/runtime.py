"""Process groups, device and seeds of the ranks of one stage."""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import distributed

from nemo_spin.errors import ConfigError, StageError, explain
from nemo_spin.megatron.phases import Phases


@dataclass(frozen=True)
class Runtime:
    """Where this rank stands.

    Attributes:
        device: Device that holds this rank's parameters.
        rank: Global rank.
        world_size: Number of ranks.
        tp_rank, tp_size: Position in and size of the tensor-parallel group.
        pp_rank, pp_size: The same for the pipeline.
        cp_rank, cp_size: The same for context parallelism, whose ranks share a replica's rows.
        dp_rank, dp_size: The same for data parallelism, over replicas.
        tp_group: Tensor-parallel process group.
        cp_group: Context-parallel process group.
        dp_group: Data-parallel process group; one rank of each replica.
        ep_size: Ranks that share the experts of a layer.
        phases: Where all ranks meet at the beginning of each part of a stage.
    """

    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    tp_group: Any
    cp_group: Any
    dp_group: Any
    ep_size: int = 1
    phases: Phases | None = None

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank writes files and reports progress."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer."""
        return self.pp_rank == self.pp_size - 1

    @property
    def speaks_for_replica(self) -> bool:
        """Whether this rank is the one of its data-parallel replica that holds results."""
        return self.is_last_stage and self.tp_rank == 0 and self.cp_rank == 0


def choose_accelerator(accelerator: str) -> None:
    """Applies `trainer.accelerator` to this process, before it has used a GPU.

    Args:
        accelerator: `auto`, `gpu`, or `cpu`, which hides the GPUs that there are.

    Raises:
        ConfigError: GPUs are asked for, and there is none that works.
    """
    if accelerator == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError(
            explain(
                "trainer.accelerator",
                found="gpu, and PyTorch finds none here",
                rule="every rank has a GPU",
                remedy="look at nvidia-smi and CUDA_VISIBLE_DEVICES, or set it to cpu",
            )
        )


def _take_gpu() -> None:
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ConfigError(
            explain(
                "trainer.devices",
                found=f"local rank {local_rank}, and {gpus} GPU{'s' if gpus > 1 else ''} visible",
                rule="every rank has a GPU of its own, and sees all GPUs of its node",
                remedy="lower trainer.devices, give ranks no GPUs one by one (srun --gpus-per-task), "
                "or set trainer.accelerator=cpu",
            )
        )
    torch.cuda.set_device(local_rank)


def initialize(
    *,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    seed: int,
    timeout_s: float = 1800.0,
) -> Runtime:
    """Joins the process groups that `RANK`, `WORLD_SIZE` and `MASTER_*` name. All ranks must call.

    On a machine without a GPU the CPU backend (`megatron/cpu.py`) is installed and gloo
    is used; with GPUs, NCCL and the GPU of `LOCAL_RANK`.

    Args:
        seed: Seeds PyTorch and Megatron's per-region random states.
        timeout_s: Seconds after which a collective that some rank never entered fails.

    Raises:
        ConfigError: The number of ranks is not divisible by the model-parallel size, or there are
            more of them here than GPUs.
        StageError: Some ranks did not come in time.
    """
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        from nemo_spin.megatron import cpu

        cpu.install()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's sequence parallelism wants it
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    model_parallel_size = tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    if world_size % model_parallel_size:
        raise ConfigError(
            explain(
                "trainer.devices x trainer.num_nodes",
                found=f"{world_size} ranks for a model-parallel size of {model_parallel_size}",
                rule="ranks are a multiple of tensor x pipeline x context parallel size",
                remedy="change trainer.devices, trainer.num_nodes or the parallel sizes",
            )
        )
    if has_gpu:
        _take_gpu()
    phases = None
    if not distributed.is_initialized():
        phases = _init_process_group(has_gpu=has_gpu, rank=rank, world_size=world_size, timeout_s=timeout_s)
    runtime = _initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        seed=seed,
        timeout_s=timeout_s,
    )
    return replace(runtime, phases=phases)


def _init_process_group(*, has_gpu: bool, rank: int, world_size: int, timeout_s: float) -> Phases:
    timeout = datetime.timedelta(seconds=timeout_s)
    store = _store(rank, world_size, timeout)
    phases = Phases(store, rank=rank, world_size=world_size, timeout_s=timeout_s)
    phases.enter("joining the process groups")  # which would not say who is missing
    distributed.init_process_group(
        "nccl" if has_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
    )
    return phases


def _store(rank: int, world_size: int, timeout: datetime.timedelta) -> Any:
    """The key-value store by which ranks find each other; rank 0 has it, or torchrun's agent."""
    untyped: Any = distributed  # its stores have types in some builds of torch only
    if world_size == 1 and "MASTER_PORT" not in os.environ:
        return untyped.HashStore()
    agent_has_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return untyped.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size,
            is_master=rank == 0 and not agent_has_it,
            timeout=timeout,
            wait_for_workers=False,
        )
    except RuntimeError as error:
        raise StageError(
            explain(
                f"joining the process groups on rank {rank}",
                found=f"rank 0 does not answer at MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT "
                f"{os.environ['MASTER_PORT']} ({type(error).__name__}: {str(error).splitlines()[0][:200]})",
                rule="rank 0 is there within launcher.collective_timeout_s, and can be reached",
                remedy="look at its log, and at what lies between the machines",
            )
        ) from error


def _initialize_model_parallel(
    *,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    virtual_pipeline_model_parallel_size: int | None,
    context_parallel_size: int,
    expert_model_parallel_size: int,
    seed: int,
    timeout_s: float,
) -> Runtime:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        expert_tensor_parallel_size=1,  # an expert is whole on its rank
        distributed_timeout_minutes=max(1, int(timeout_s // 60)),
        create_gloo_process_groups=False,  # beside NCCL's; nothing here uses them
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Runtime(
        device=torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu"),
        rank=distributed.get_rank(),
        world_size=distributed.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
    )


def finalize() -> None:
    """Leaves the process groups. All ranks must call."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if distributed.is_initialized():
        distributed.destroy_process_group()
    gc.collect()  # models are cycles that hold groups, and every group of gloo a thread that never rests


@contextmanager
def first_rank_writes(runtime: Runtime) -> Iterator[bool]:
    """Yields whether this rank is the one that writes; all ranks leave together, or raise together.

    A disk that is full for rank 0 must not leave the others waiting in a collective.
    All ranks must enter.
    """
    error: Exception | None = None
    try:
        yield runtime.is_first_rank
    except Exception as caught:
        error = caught
    failed: list[Any] = [None] * runtime.world_size
    distributed.all_gather_object(failed, (type(error).__name__, str(error)) if error else None)
    if error is not None:
        raise error
    for failure in failed:
        if failure is not None:
            from nemo_spin.errors import error_from_name

            raise error_from_name(*failure)
