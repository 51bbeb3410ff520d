"""Rules about low-rank adapters: `model.lora`."""

from __future__ import annotations

from collections import Counter

from nemo_spin.config.mistakes import Mistake, mistake
from nemo_spin.config.schema import Config, LoraConfig

# The linear layers of a decoder layer, as Llama's checkpoints (and most users of `peft`) call them.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

MAX_SERVED_RANK = 512  # of vLLM


def targets_of(lora: LoraConfig, *, gated: bool) -> tuple[str, ...]:
    """The linear layers that get adapters, in a fixed order.

    Args:
        lora: The settings.
        gated: Whether the model's MLP has a gate; where it has none, `null` leaves it out.
    """
    if lora.target_modules is not None:
        return tuple(name for name in LORA_TARGETS if name in lora.target_modules)
    return tuple(name for name in LORA_TARGETS if gated or name != "gate_proj")


def targets_are_listed_once(config: Config) -> list[Mistake]:
    """A list names at least one layer, and none twice."""
    names = config.model.lora.target_modules
    if names is None or (names and len(set(names)) == len(names)):
        return []
    twice = [name for name, count in Counter(names).items() if count > 1]
    return [
        mistake(
            "model.lora.target_modules",
            found=f"{names}, with {', '.join(twice)} twice" if twice else "an empty list",
            rule="every linear layer that gets an adapter is named once",
            remedy="name each once, or set it to null for all of them; model.lora.rank=null turns LoRA off",
        )
    ]


def adapters_are_there_to_be_exported(config: Config) -> list[Mistake]:
    """Without adapters there is none to export."""
    if not config.model.lora.export_adapter or config.model.lora.rank is not None:
        return []
    return [
        mistake(
            "model.lora.export_adapter",
            found="true, with model.lora.rank null",
            rule="an adapter is exported where one was trained",
            remedy="set model.lora.rank (such as 16), or model.lora.export_adapter to false",
            also=("model.lora.rank",),
        )
    ]


def new_adapters_have_new_state(config: Config) -> list[Mistake]:
    """Optimizer state of merged adapters says nothing about new ones."""
    if not config.model.optim.carry_over or config.model.lora.rank is None:
        return []
    return [
        mistake(
            "model.optim.carry_over",
            found=f"true, with model.lora.rank {config.model.lora.rank}",
            rule="each iteration starts new adapters, and the state belongs to those that were merged",
            remedy="set it to false, or model.lora.rank to null",
            also=("model.lora.rank",),
        )
    ]


def archives_hold_whole_models(config: Config) -> list[Mistake]:
    """A .nemo file of a model in training would hold the weights without what the adapters say."""
    callback = config.exp_manager.checkpoint_callback_params
    if not callback.save_nemo_on_train_end or config.model.lora.rank is None:
        return []
    return [
        mistake(
            "exp_manager.checkpoint_callback_params.save_nemo_on_train_end",
            found=f"true, with model.lora.rank {config.model.lora.rank}",
            rule="a .nemo file holds a whole model, and adapters are merged when it is exported",
            remedy="set it to false: iter_XX/model has the merged model as a Hugging Face directory",
            also=("model.lora.rank",),
        )
    ]


def largest_rank(config: Config) -> int:
    """Of the adapter of the last model: every iteration's rank comes on top."""
    return (config.model.lora.rank or 0) * config.spin.iterations


def adapters_can_be_served(config: Config) -> list[Mistake]:
    """The sampler loads adapters that are written, and that are not too large for it."""
    if not config.generation.adapters:
        return []
    if not config.model.lora.export_adapter:
        return [
            mistake(
                "generation.adapters",
                found="true, with model.lora.export_adapter false",
                rule="the sampler loads the adapters that are exported",
                remedy="set model.lora.export_adapter to true, or generation.adapters to false",
                also=("model.lora.export_adapter",),
            )
        ]
    if config.generation.engine == "vllm_server":
        return [
            mistake(
                "generation.adapters",
                found="true, with generation.engine vllm_server",
                rule="only an engine of our own is started so that it takes adapters",
                remedy="set it to false, or generation.engine to vllm",
                also=("generation.engine",),
            )
        ]
    rank, iterations, largest = config.model.lora.rank, config.spin.iterations, largest_rank(config)
    if largest <= MAX_SERVED_RANK:
        return []
    return [
        mistake(
            "generation.adapters",
            found=f"true, with model.lora.rank {rank} and {iterations} iterations",
            rule=f"vLLM takes adapters of rank {MAX_SERVED_RANK} at most; that of the last has {largest}",
            remedy="set it to false: the sampler then loads the merged models",
            also=("model.lora.rank", "spin.iterations"),
        )
    ]


def gate_is_there(config: Config, *, gated: bool) -> list[Mistake]:
    """A model without a gated MLP has no `gate_proj`.

    Args:
        config: The configuration.
        gated: Whether the model's MLP has a gate.
    """
    lora = config.model.lora
    if gated or lora.rank is None or "gate_proj" not in (lora.target_modules or ()):
        return []
    return [
        mistake(
            "model.lora.target_modules",
            found=f"{lora.target_modules}, and the model's MLP has no gate",
            rule="adapters stand beside linear layers that the model has",
            remedy="leave gate_proj out, or set it to null for all that there are",
        )
    ]


def experts_have_no_adapters(config: Config, *, num_experts: int) -> list[Mistake]:
    """The linear layers of experts are fused, and get no adapters.

    Args:
        config: The configuration.
        num_experts: Experts of a layer; 0: the model has none.
    """
    if not num_experts or config.model.lora.rank is None:
        return []
    return [
        mistake(
            "model.lora.rank",
            found=f"{config.model.lora.rank}, and the model has {num_experts} experts in a layer",
            rule="adapters stand beside the linear layers of a dense model",
            remedy="set it to null to train all weights",
        )
    ]
