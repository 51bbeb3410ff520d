"""The range or the names that each single key allows."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from nemo_spin.config.lora_rules import LORA_TARGETS
from nemo_spin.config.schema import GuardsConfig


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`; a bound that is `above`/`below` is left out itself."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    whole: bool = False

    def holds(self, value: Any) -> bool:
        """Whether `value` is a number of this range (a truth value is none)."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (not self.whole or isinstance(value, int))
        )

    def __str__(self) -> str:
        """The range in words."""
        kind = "a whole number" if self.whole else "a number"
        if self.low is not None and self.high is not None:
            return f"{kind} from {self.low:g} to {self.high:g}"
        bounds = (
            ("of at least", self.low),
            ("above", self.above),
            ("of at most", self.high),
            ("below", self.below),
        )
        return f"{kind} " + " and ".join(f"{words} {bound:g}" for words, bound in bounds if bound is not None)


_COUNT = Range(low=1, whole=True)
_FROM_ZERO = Range(low=0, whole=True)
_POSITIVE = Range(above=0)
_SHARE = Range(low=0, high=1)

# The guards of `selfplay.guards`.
GUARDS = tuple(entry.name for entry in fields(GuardsConfig) if entry.name != "window_steps")
# Those of them that fire at low values.
LOW_GUARDS = frozenset({"distinct_share", "eos_share"})

# Keys typed `X | None` may be null besides.
RANGES: dict[str, Range] = {
    "seed": Range(low=0, below=2**31, whole=True),
    "model.tensor_model_parallel_size": _COUNT,
    "model.pipeline_model_parallel_size": _COUNT,
    "model.virtual_pipeline_model_parallel_size": Range(low=2, whole=True),
    "model.num_layers_in_first_pipeline_stage": _COUNT,
    "model.num_layers_in_last_pipeline_stage": _COUNT,
    "model.context_parallel_size": _COUNT,
    "model.expert_model_parallel_size": _COUNT,
    "model.micro_batch_size": _COUNT,
    "model.micro_batch_tokens": _COUNT,
    "model.global_batch_size": _COUNT,
    "model.recompute_num_layers": _COUNT,
    "model.optimizer_offload_fraction": Range(above=0, high=1),
    "model.lora.rank": _COUNT,
    "model.lora.alpha": _POSITIVE,
    "model.lora.dropout": Range(low=0, below=1),
    "model.optim.weight_decay": Range(low=0),
    "model.optim.eps": _POSITIVE,
    "model.optim.alpha": Range(low=0, below=1),
    "model.optim.clip_grad": Range(low=0),
    "model.optim.sched.warmup_ratio": _SHARE,
    "model.optim.sched.min_lr_ratio": _SHARE,
    "spin.iterations": _COUNT,
    "spin.history": _FROM_ZERO,
    "spin.label_smoothing": Range(low=0, below=0.5),
    "spin.sft_weight": Range(low=0),
    "spin.dpop_weight": Range(low=0),
    "spin.opponent_mix": _SHARE,
    "spin.gates.ln2_tolerance": _POSITIVE,
    "spin.gates.sampler_tolerance": _POSITIVE,
    "selfplay.guards.window_steps": _COUNT,
    **{f"selfplay.guards.{guard}.{level}": Range(low=0) for guard in GUARDS for level in ("warn", "stop")},
    "sft.lr": _POSITIVE,
    "sft.epochs": _COUNT,
    "sft.max_steps": _COUNT,
    "data.max_prompt_length": _COUNT,
    "data.max_response_length": _COUNT,
    "data.max_quarantined_share": _SHARE,
    "data.max_rows": _COUNT,
    "data.num_workers": _COUNT,
    "generation.num_generations": _COUNT,
    "generation.top_k": _FROM_ZERO,
    "generation.max_tokens": _COUNT,
    "generation.tensor_parallel_size": _COUNT,
    "generation.replicas": _COUNT,
    "generation.replica_attempts": _COUNT,
    "generation.lease_timeout_s": _POSITIVE,
    "generation.shard_rows": _COUNT,
    "generation.max_num_seqs": _COUNT,
    "generation.kv_cache_gib": _POSITIVE,
    "generation.server_timeout_s": _POSITIVE,
    "generation.load_timeout_s": _POSITIVE,
    "generation.shard_timeout_s": _POSITIVE,
    "trainer.devices": _COUNT,
    "trainer.num_nodes": _COUNT,
    "trainer.log_every_n_steps": _COUNT,
    "trainer.val_check_interval": _COUNT,
    "trainer.save_interval": _COUNT,
    "trainer.save_top_k": _COUNT,
    "launcher.timeout_s": _POSITIVE,
    "launcher.collective_timeout_s": _POSITIVE,
    "launcher.hang_timeout_s": _POSITIVE,
    "launcher.attempts": _COUNT,
    "launcher.backoff_s": Range(low=0),
    "launcher.preemption_grace_s": Range(low=0),
    "launcher.omp_num_threads": _COUNT,
    "launcher.join_timeout_s": _POSITIVE,
    "launcher.silence_timeout_s": _POSITIVE,
    "launcher.slurm.gpus_per_node": _FROM_ZERO,
    "launcher.slurm.cpus_per_task": _COUNT,
    "launcher.slurm.signal_s": Range(low=1, high=65535, whole=True),  # as sbatch
    "evaluation.num_prompts": _COUNT,
    "evaluation.benchmarks.limit": _COUNT,
    "evaluation.benchmarks.max_length": _COUNT,
    "evaluation.benchmarks.timeout_s": _POSITIVE,
}

# A scalar, or a list with one value for each iteration.
PER_ITERATION: dict[str, Range] = {
    "spin.beta": _POSITIVE,
    "spin.lr": _POSITIVE,
    "spin.epochs": _COUNT,
    "spin.max_steps": _COUNT,
    "spin.num_prompts": _COUNT,
    "generation.temperature": Range(low=0),
    "generation.top_p": Range(above=0, high=1),
}

# Those of them that may be null.
OPTIONAL_PER_ITERATION = frozenset({"spin.max_steps", "spin.num_prompts"})

# What `spin.per_iteration` may change, besides all of `model.optim`.
SAMPLING_PER_ITERATION = frozenset(
    {
        "generation.temperature",
        "generation.top_p",
        "generation.top_k",
        "generation.max_tokens",
        "generation.num_generations",
        "generation.stop_token_ids",
    }
)

# Every value of the list.
LISTS: dict[str, Range] = {
    "model.optim.betas": Range(low=0, below=1),
    "generation.stop_token_ids": _FROM_ZERO,
    "spin.mixture": Range(low=0),
}

# A name, or a list of such names.
NAMES: dict[str, tuple[str, ...]] = {
    "model.lora.target_modules": LORA_TARGETS,
    "model.packing": ("shared_prompt", "pairs", "none"),
    "model.transformer_impl": ("auto", "transformer_engine", "local"),
    "model.fp8": ("hybrid", "e4m3"),
    "model.fp8_recipe": ("tensorwise", "delayed", "blockwise", "mxfp8"),
    "model.recompute_granularity": ("selective", "full"),
    "model.recompute_modules": ("core_attn", "mlp"),
    "model.recompute_method": ("uniform", "block"),
    "model.optim.name": ("rmsprop", "adam"),
    "model.optim.sched.name": ("linear", "cosine", "constant"),
    "selfplay.keep": ("best", "last"),
    "data.format": ("messages", "prompt_response", "spin"),
    "data.overlong_prompt": ("quarantine", "truncate_left"),
    "data.overlong_response": ("truncate", "quarantine"),
    "generation.engine": ("vllm", "vllm_server"),
    "generation.keep_engine": ("auto", "always", "never"),
    "generation.dtype": ("auto", "float32", "bfloat16", "float16"),
    "trainer.accelerator": ("auto", "gpu", "cpu"),
    "trainer.precision": ("auto", "32", "bf16"),
    "launcher.name": ("local", "slurm", "external"),
    "launcher.slurm.container_runtime": ("pyxis", "apptainer", "singularity"),
}

# Texts that must not be empty (null where the schema allows it).
TEXTS: tuple[str, ...] = (
    "name",
    "run_dir",
    "model.path",
    "spin.loss",
    "sft.output",
    "export.checkpoint",
    "export.output",
    "data.train",
    "data.heldout",
    "data.train_split",
    "data.heldout_split",
    "data.subset",
    "data.revision",
    "data.messages_column",
    "data.prompt_column",
    "data.response_column",
    "data.id_column",
    "data.prompt_template",
    "data.system_prompt",
    "generation.python",
    "generation.server",
    "launcher.slurm.job_name",
    "launcher.slurm.account",
    "launcher.slurm.partition",
    "launcher.slurm.qos",
    "launcher.slurm.constraint",
    "launcher.slurm.python",
    "launcher.slurm.container_image",
    "evaluation.scorer",
    "evaluation.benchmarks.include_path",
)

_LOOP = ("run_dir", "model.path", "data.train")

# What must be given for a command, of the keys that have no default.
REQUIRED: dict[str, tuple[str, ...]] = {
    "run": _LOOP,
    "prepare": _LOOP,
    "generate": _LOOP,
    "score": _LOOP,
    "train": _LOOP,
    "export": _LOOP,
    "evaluate": _LOOP,
    "sft": ("sft.output", "model.path", "data.train"),
    "import-hf": ("run_dir", "model.path"),
    "export of a checkpoint": ("run_dir", "model.path", "export.output"),
}
