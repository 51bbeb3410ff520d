"""Rules about several keys, or about the form of one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from omegaconf import MISSING

from nemo_spin.config.benchmark_rules import (
    BENCHMARK_KEYS,
    benchmarks_have_an_engine,
    tasks_say_how_they_are_asked,
)
from nemo_spin.config.expert_rules import experts_divide_the_ranks
from nemo_spin.config.fp8_rules import FP8_KEYS, fp8_has_what_it_needs
from nemo_spin.config.guard_rules import GUARD_KEYS, a_guard_warns_before_it_stops
from nemo_spin.config.history_rules import HISTORY_KEYS, mixture_has_an_amount_for_each_age
from nemo_spin.config.lora_rules import (
    adapters_are_there_to_be_exported,
    adapters_can_be_served,
    archives_hold_whole_models,
    new_adapters_have_new_state,
    targets_are_listed_once,
)
from nemo_spin.config.loss_rules import loss_is_known_or_a_function
from nemo_spin.config.mistakes import Mistake, mistake
from nemo_spin.config.optimizer_rules import OFFLOADING_KEYS, offloading_is_for_a_sharded_adam_on_gpus
from nemo_spin.config.overlap_rules import OVERLAP_KEYS, overlap_has_something_to_overlap
from nemo_spin.config.pipeline_rules import (
    PIPELINE_KEYS,
    interleaving_needs_a_pipeline,
    uneven_stages_are_meant,
)
from nemo_spin.config.recompute_rules import RECOMPUTE_KEYS, recomputation_is_of_one_kind
from nemo_spin.config.replica_rules import REPLICA_KEYS, samplers_have_devices
from nemo_spin.config.schema import Config
from nemo_spin.config.server_rules import SERVER_KEYS, server_is_for_its_engine
from nemo_spin.config.slurm_rules import SLURM_KEYS, slurm_understands

_RANKS = ("trainer.devices", "trainer.num_nodes")
_SIZES = (
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.context_parallel_size",
)


@dataclass(frozen=True)
class Relation:
    """A rule, and the keys that must be right by themselves before it is worth checking."""

    keys: tuple[str, ...]
    check: Callable[[Config], list[Mistake]]


def world_size(config: Config) -> int:
    """Ranks of a training stage."""
    return config.trainer.devices * config.trainer.num_nodes


def data_parallel_size(config: Config) -> int:
    """Replicas of the policy among the ranks: the world over TP x PP x CP, rounded down."""
    model = config.model
    replica = (
        model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    )
    return world_size(config) // replica


def _parallel_sizes_divide_the_world(config: Config) -> list[Mistake]:
    model, world = config.model, world_size(config)
    sizes = (
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.context_parallel_size,
    )
    if world % math.prod(sizes) == 0:
        return []
    return [
        mistake(
            _SIZES[0],
            found=f"TP x PP x CP = {' x '.join(map(str, sizes))} = {math.prod(sizes)} does not divide "
            f"the {world} ranks (trainer.devices {config.trainer.devices} x trainer.num_nodes "
            f"{config.trainer.num_nodes})",
            rule="tensor, pipeline and context parallel sizes together must divide the number of ranks",
            remedy=f"set trainer.devices to a multiple of {math.prod(sizes)}, or lower the parallel sizes",
            also=(*_SIZES[1:], *_RANKS),
        )
    ]


def _batches_divide(config: Config) -> list[Mistake]:
    if _parallel_sizes_divide_the_world(config):
        return []  # the data-parallel size is not known before that is mended
    if config.model.packing != "none":
        return []  # packed ranks may take different numbers of microbatches
    model, dp_size = config.model, data_parallel_size(config)
    portion = model.micro_batch_size * dp_size
    if model.global_batch_size % portion == 0:
        return []
    nearest_batch = max(1, round(model.global_batch_size / portion)) * portion
    return [
        mistake(
            "model.global_batch_size",
            found=f"{model.global_batch_size} is not a multiple of {portion} = model.micro_batch_size "
            f"{model.micro_batch_size} x {dp_size} data-parallel ranks",
            rule="every data-parallel rank takes the same number of whole microbatches in a step",
            remedy=f"set it to {nearest_batch}, or change model.micro_batch_size",
            also=("model.micro_batch_size", *_SIZES, *_RANKS),
        )
    ]


def _sequence_parallel_needs_tensor_parallel(config: Config) -> list[Mistake]:
    if not config.model.sequence_parallel or config.model.tensor_model_parallel_size > 1:
        return []
    return [
        mistake(
            "model.sequence_parallel",
            found="true, with model.tensor_model_parallel_size 1",
            rule="it splits activations over the tensor-parallel ranks, so there must be several",
            remedy="set it to false, or model.tensor_model_parallel_size to 2 or more",
            also=("model.tensor_model_parallel_size",),
        )
    ]


def _local_launcher_has_one_node(config: Config) -> list[Mistake]:
    if config.launcher.name != "local" or config.trainer.num_nodes == 1:
        return []
    return [
        mistake(
            "trainer.num_nodes",
            found=f"{config.trainer.num_nodes}, with launcher.name local",
            rule="the local launcher starts ranks on this machine only",
            remedy="set it to 1 and trainer.devices to the number of ranks, or use another launcher",
            also=("launcher.name",),
        )
    ]


def _transformer_engine_needs_a_gpu(config: Config) -> list[Mistake]:
    if config.model.transformer_impl != "transformer_engine" or config.trainer.accelerator != "cpu":
        return []
    return [
        mistake(
            "model.transformer_impl",
            found="transformer_engine, with trainer.accelerator cpu",
            rule="Transformer Engine's layers run on GPUs only",
            remedy="set it to auto or local",
            also=("trainer.accelerator",),
        )
    ]


def _two_betas(config: Config) -> list[Mistake]:
    betas = config.model.optim.betas
    if len(betas) == 2:
        return []
    return [
        mistake(
            "model.optim.betas",
            found=betas,
            rule="two numbers: the decay of the first and of the second moment",
            remedy="such as [0.9, 0.999]",
        )
    ]


def _template_has_a_place_for_the_prompt(config: Config) -> list[Mistake]:
    template = config.data.prompt_template
    if template is None:
        return []
    if "\\n" in template:
        return [
            mistake(
                "data.prompt_template",
                found=f"{template!r} has a backslash and an n where a line break is meant",
                rule="line breaks are line breaks",
                remedy="in YAML use double quotes; in the shell $'data.prompt_template=…\\n…'",
            )
        ]
    if template.count("{prompt}") == 1:
        return []
    return [
        mistake(
            "data.prompt_template",
            found=f"{template!r} has {template.count('{prompt}')} places {{prompt}}",
            rule="the text {prompt} stands exactly once, where the prompt goes",
            remedy="such as '### Instruction: {prompt}\\n\\n### Response: ', "
            "or null for the tokenizer's chat template",
        )
    ]


def _several_generations_need_chance(config: Config) -> list[Mistake]:
    temperature = config.generation.temperature
    values = temperature if isinstance(temperature, list) else [temperature]
    if config.generation.num_generations == 1 or 0 not in values:
        return []
    return [
        mistake(
            "generation.num_generations",
            found=f"{config.generation.num_generations}, with generation.temperature {temperature}",
            rule="at temperature 0 every answer to a prompt is the same",
            remedy="set it to 1, or generation.temperature above 0",
            also=("generation.temperature",),
        )
    ]


def _generations_come_with_official_data(config: Config) -> list[Mistake]:
    data = config.data
    if not data.use_generations or (data.format == "spin" and config.generation.num_generations == 1):
        return []
    return [
        mistake(
            "data.use_generations",
            found=f"true, with data.format {data.format} and generation.num_generations "
            f"{config.generation.num_generations}",
            rule="the official format (`real` and `generated`) has one answer to each prompt",
            remedy="set data.format=spin and generation.num_generations=1 (spin.per_iteration may raise it "
            "later), or data.use_generations=false to use its prompts and sample",
            also=("data.format", "generation.num_generations"),
        )
    ]


def _name_is_a_file_name(config: Config) -> list[Mistake]:
    if re.fullmatch(r"[^/\\\0\n]+", config.name) and config.name not in (".", ".."):
        return []
    return [
        mistake(
            "name",
            found=repr(config.name),
            rule="it names the run in loggers and file names: no slashes, no line breaks",
            remedy="such as spin; the place of the run is run_dir",
        )
    ]


def _scorer_names_a_function(config: Config) -> list[Mistake]:
    scorer = config.evaluation.scorer
    if scorer is None or re.fullmatch(r".+:[A-Za-z_]\w*", scorer):
        return []
    return [
        mistake(
            "evaluation.scorer",
            found=repr(scorer),
            rule="`package.module:function` or `path/to/file.py:function`",
            remedy="name the function after a colon",
        )
    ]


def _scorer_has_prompts(config: Config) -> list[Mistake]:
    evaluation = config.evaluation
    if evaluation.scorer is None or not evaluation.enabled or config.data.heldout is not None:
        return []
    return [
        mistake(
            "evaluation.scorer",
            found="given, but data.heldout is null",
            rule="answers to held-out prompts are scored",
            remedy="set data.heldout, or evaluation.enabled to false",
            also=("data.heldout", "evaluation.enabled"),
        )
    ]


def _fine_tuning_has_its_own_directory(config: Config) -> list[Mistake]:
    if config.sft.output == MISSING or config.sft.output != config.run_dir:
        return []
    return [
        mistake(
            "sft.output",
            found=f"{config.sft.output!r} is run_dir too",
            rule="fine-tuning has a run directory of its own",
            remedy="choose another directory",
            also=("run_dir",),
        )
    ]


def _wandb_has_a_project(config: Config) -> list[Mistake]:
    manager = config.exp_manager
    if not manager.create_wandb_logger or manager.wandb_logger_kwargs.get("project"):
        return []
    return [
        mistake(
            "exp_manager.wandb_logger_kwargs",
            found=manager.wandb_logger_kwargs,
            rule="Weights & Biases needs the key `project`",
            remedy="set exp_manager.wandb_logger_kwargs.project, or exp_manager.create_wandb_logger to false",
            also=("exp_manager.create_wandb_logger",),
        )
    ]


RELATIONS: tuple[Relation, ...] = (
    Relation((*_SIZES, *_RANKS), _parallel_sizes_divide_the_world),
    Relation(
        (*_SIZES, *_RANKS, "model.packing", "model.micro_batch_size", "model.global_batch_size"),
        _batches_divide,
    ),
    Relation(PIPELINE_KEYS, interleaving_needs_a_pipeline),
    Relation(PIPELINE_KEYS, uneven_stages_are_meant),
    Relation(RECOMPUTE_KEYS, recomputation_is_of_one_kind),
    Relation(OVERLAP_KEYS, overlap_has_something_to_overlap),
    Relation(("model.sequence_parallel", _SIZES[0]), _sequence_parallel_needs_tensor_parallel),
    Relation(("model.expert_model_parallel_size", *_SIZES, *_RANKS), experts_divide_the_ranks),
    Relation(REPLICA_KEYS, samplers_have_devices),
    Relation(OFFLOADING_KEYS, offloading_is_for_a_sharded_adam_on_gpus),
    Relation(("launcher.name", "trainer.num_nodes"), _local_launcher_has_one_node),
    Relation(SLURM_KEYS, slurm_understands),
    Relation(("model.transformer_impl", "trainer.accelerator"), _transformer_engine_needs_a_gpu),
    Relation(FP8_KEYS, fp8_has_what_it_needs),
    Relation(("model.optim.betas",), _two_betas),
    Relation(("model.lora.target_modules",), targets_are_listed_once),
    Relation(("model.lora.rank", "model.lora.export_adapter"), adapters_are_there_to_be_exported),
    Relation(
        (
            "generation.adapters",
            "generation.engine",
            "model.lora.rank",
            "model.lora.export_adapter",
            "spin.iterations",
        ),
        adapters_can_be_served,
    ),
    Relation(("model.lora.rank", "model.optim.carry_over"), new_adapters_have_new_state),
    Relation(
        ("model.lora.rank", "exp_manager.checkpoint_callback_params.save_nemo_on_train_end"),
        archives_hold_whole_models,
    ),
    Relation(("data.prompt_template",), _template_has_a_place_for_the_prompt),
    Relation(("generation.num_generations", "generation.temperature"), _several_generations_need_chance),
    Relation(SERVER_KEYS, server_is_for_its_engine),
    Relation(("spin.loss",), loss_is_known_or_a_function),
    Relation(GUARD_KEYS, a_guard_warns_before_it_stops),
    Relation(HISTORY_KEYS, mixture_has_an_amount_for_each_age),
    Relation(
        ("data.use_generations", "data.format", "generation.num_generations"),
        _generations_come_with_official_data,
    ),
    Relation(("name",), _name_is_a_file_name),
    Relation(("evaluation.scorer",), _scorer_names_a_function),
    Relation(BENCHMARK_KEYS[:1], tasks_say_how_they_are_asked),
    Relation(BENCHMARK_KEYS, benchmarks_have_an_engine),
    Relation(("evaluation.scorer", "evaluation.enabled", "data.heldout"), _scorer_has_prompts),
    Relation(("sft.output", "run_dir"), _fine_tuning_has_its_own_directory),
    Relation(("exp_manager.create_wandb_logger", "exp_manager.wandb_logger_kwargs"), _wandb_has_a_project),
)
