"""Recipes: each composes, is valid, says what it was planned for, and fits there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.bridge.families import architecture_of
from nemo_spin.bridge.peft_files import projection_names
from nemo_spin.config.compose import RECIPES, conf_dir, names
from nemo_spin.config.iterations import at_iteration
from nemo_spin.config.load import load_config
from nemo_spin.config.schema import Config
from nemo_spin.config.validate import check_model_fits
from nemo_spin.errors import ConfigError
from nemo_spin.megatron.costs import usable_bytes
from nemo_spin.megatron.learning_rate import learning_rate
from nemo_spin.selfplay.planning.command import plan
from nemo_spin.selfplay.planning.layouts import settings
from nemo_spin.selfplay.planning.plan import Plan
from nemo_spin.selfplay.planning.request import Lengths

# As published in config.json of each model.
LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
MISTRAL_7B = {
    **LLAMA_3_8B,
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
QWEN3_8B = {
    **LLAMA_3_8B,
    "architectures": ["Qwen3ForCausalLM"],
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
LLAMA_2_70B = {
    **LLAMA_3_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}
GPT_NEO_125M = {
    "architectures": ["GPTNeoForCausalLM"],
    "hidden_size": 768,
    "intermediate_size": None,
    "num_layers": 12,
    "num_heads": 12,
    "vocab_size": 50257,
    "max_position_embeddings": 2048,
    "window_size": 256,
    "attention_types": [[["global", "local"], 6]],
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
MODELS = {
    "zephyr_7b_paper": MISTRAL_7B,
    "zephyr_7b_official": MISTRAL_7B,
    "llama3_8b": LLAMA_3_8B,
    "qwen3_8b": QWEN3_8B,
    "tulu2_70b": LLAMA_2_70B,
    "gptneo_lora": GPT_NEO_125M,
}
PAIRS = 50_000
_CLUSTER = re.compile(r"^# Cluster: (\d+) nodes? of (\d+) (\S+)", re.MULTILINE)


def overrides(tmp_path: Path, recipe: str) -> list[str]:
    """What a user adds; the model directory holds config.json alone."""
    model = tmp_path / recipe
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(MODELS[recipe]))
    return [f"run_dir={tmp_path / 'run'}", f"model.path={model}"]


def config_of(tmp_path: Path, recipe: str, *more: str) -> Config:
    return load_config(f"{RECIPES}/{recipe}", [*overrides(tmp_path, recipe), *more], command="run")


def planned_for(recipe: str) -> tuple[int, int, str]:
    """Nodes, GPUs of each and their kind, from the comment that every recipe has."""
    found = _CLUSTER.search((conf_dir() / RECIPES / f"{recipe}.yaml").read_text())
    assert found is not None, "a line `# Cluster: 1 node of 8 H100`"
    return int(found[1]), int(found[2]), found[3]


def plan_as_written(tmp_path: Path, recipe: str, *, gpu: str) -> Plan:
    """A plan that may choose nothing: all that a plan chooses has the recipe's value."""
    config = config_of(tmp_path, recipe)
    model = config.model
    written = {
        "model.tensor_model_parallel_size": model.tensor_model_parallel_size,
        "model.pipeline_model_parallel_size": model.pipeline_model_parallel_size,
        "model.virtual_pipeline_model_parallel_size": model.virtual_pipeline_model_parallel_size,
        "model.context_parallel_size": model.context_parallel_size,
        "model.sequence_parallel": model.sequence_parallel,
        "model.recompute_granularity": model.recompute_granularity,
        "model.micro_batch_tokens": model.micro_batch_tokens,
        "generation.tensor_parallel_size": config.generation.tensor_parallel_size,
        "generation.replicas": config.generation.replicas,
    }
    pinned = [f"{key}={'null' if value is None else str(value).lower()}" for key, value in written.items()]
    nodes, gpus, _ = planned_for(recipe)
    return plan(
        f"{RECIPES}/{recipe}",
        [*overrides(tmp_path, recipe), *pinned],
        model=None,
        nodes=nodes,
        gpus_per_node=gpus,
        gpu=gpu,
        pairs=PAIRS,
        lengths=Lengths(),
    )


def test_every_recipe_has_a_model_here() -> None:
    assert {f"{RECIPES}/{recipe}" for recipe in MODELS} == {name for name in names() if "/" in name}


@pytest.mark.parametrize("recipe", MODELS)
def test_a_recipe_needs_a_place_and_a_model_only(recipe: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, recipe)
    nodes, gpus, _ = planned_for(recipe)
    assert (config.trainer.num_nodes, config.trainer.devices) == (nodes, gpus)
    assert config.name == recipe.replace("_", "-")
    optim = config.model.optim
    found = (config.trainer.precision, optim.name, optim.weight_decay)
    assert found == (("32", "adam", 0.01) if recipe == "gptneo_lora" else ("bf16", "rmsprop", 0.0))
    architecture = architecture_of(tmp_path / recipe)
    check_model_fits(
        config,
        num_layers=architecture.num_layers,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        ffn_hidden_size=architecture.ffn_hidden_size,
        vocab_size=architecture.vocab_size,
        longest_sequence=architecture.longest_sequence,
    )
    longest = config.data.max_prompt_length + config.data.max_response_length
    assert longest <= MODELS[recipe]["max_position_embeddings"]


@pytest.mark.parametrize("recipe", MODELS)
def test_a_recipe_fits_the_gpus_it_was_planned_for(recipe: str, tmp_path: Path) -> None:
    made = plan_as_written(tmp_path, recipe, gpu=planned_for(recipe)[2])
    config, chosen = made.request.config, made.chosen
    wanted = {
        name: getattr(config.model, name)
        for name in settings(chosen.layout, chosen.work)
        if name != "use_distributed_optimizer"  # null: by the replicas
    }
    assert wanted.items() <= settings(chosen.layout, chosen.work).items()
    assert chosen.layout.distributed_optimizer is (chosen.layout.data * chosen.layout.context > 1)
    usable = usable_bytes(made.request.cluster.device)
    assert chosen.fits and chosen.memory.total <= usable
    assert made.scoring.total <= usable
    assert (made.sampling.replicas, made.sampling.sampler.tensor) == (
        config.generation.replicas,
        config.generation.tensor_parallel_size,
    )
    assert made.sampling.answers >= 1
    assert not [note for note in made.notes if "saving checkpoints" in note]


@pytest.mark.parametrize("recipe", MODELS)
def test_a_recipe_s_layout_is_about_as_fast_as_the_fastest(recipe: str, tmp_path: Path) -> None:
    nodes, gpus, gpu = planned_for(recipe)
    free = plan(
        f"{RECIPES}/{recipe}",
        overrides(tmp_path, recipe),
        model=None,
        nodes=nodes,
        gpus_per_node=gpus,
        gpu=gpu,
        pairs=PAIRS,
        lengths=Lengths(),
    )
    written = plan_as_written(tmp_path, recipe, gpu=gpu)
    # A tenth: what interleaved chunks would gain, which a recipe is simpler without.
    assert written.chosen.step.total <= 1.1 * free.chosen.step.total


@pytest.mark.parametrize(
    ("recipe", "gpu"), [("tulu2_70b", "H100"), ("zephyr_7b_paper", "H100,memory_gib=24")]
)
def test_smaller_gpus_are_refused(recipe: str, gpu: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs .* GiB of a GPU"):
        plan_as_written(tmp_path, recipe, gpu=gpu)


@pytest.mark.parametrize("recipe", ["zephyr_7b_paper", "zephyr_7b_official", "llama3_8b", "qwen3_8b"])
def test_the_paper_s_iterations(recipe: str, tmp_path: Path) -> None:
    spin = config_of(tmp_path, recipe).spin
    rounds = range(spin.iterations)
    assert [at_iteration(spin.lr, i) for i in rounds] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert [at_iteration(spin.beta, i) for i in rounds] == [0.1, 0.1, 0.1, 5.0]
    if recipe != "zephyr_7b_official":  # six, of which two are trained: below
        assert [at_iteration(spin.epochs, i) for i in rounds] == [2, 2, 2, 2]
    assert spin.history == 1


def test_the_paper_s_data_and_batches(tmp_path: Path) -> None:
    config = config_of(tmp_path, "zephyr_7b_paper")
    assert config.model.global_batch_size == 64
    assert config.model.optim.sched.warmup_ratio == 0.1
    assert config.data.max_prompt_length + config.data.max_response_length == 2048
    assert config.data.max_rows == 50_000
    assert config.data.first_round_only
    assert config.data.prompt_template == "### Instruction: {prompt}\n\n### Response: "
    assert config.generation.max_tokens == 256


def test_the_adapters_of_the_lora_reference(tmp_path: Path) -> None:
    config = config_of(tmp_path, "gptneo_lora")
    lora = config.model.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (
        128,
        256,
        0.05,
        ["q_proj", "v_proj"],
    )
    assert (config.spin.iterations, config.spin.lr, config.spin.beta) == (5, 5e-5, 0.1)
    names = projection_names(architecture_of(tmp_path / "gptneo_lora"), lora)
    assert names["q_proj"] == "transformer.h.{layer}.attn.attention.q_proj"


def test_the_official_schedule_is_of_six_epochs_and_ends_after_two(tmp_path: Path) -> None:
    config = config_of(tmp_path, "zephyr_7b_official")
    prompts, batch = 49_792, config.model.global_batch_size  # of UCLA-AGI/SPIN_iter0, 778 batches
    for iteration, num_pairs in enumerate([prompts, 2 * prompts, 2 * prompts, 2 * prompts]):
        planned = config.spin.epochs * num_pairs // batch
        kept = at_iteration(config.spin.max_steps, iteration)
        assert kept == 2 * num_pairs // batch == planned // 3
    sched = config.model.optim.sched
    for step in (0, 466, 467, 1555):
        rising, falling = (step + 1) / 466.8, (4668 - step) / (4668 - 466.8)
        ours = learning_rate(step, num_steps=4668, peak=5e-7, sched=sched)
        assert ours == pytest.approx(5e-7 * min(rising, falling), rel=3e-3)


def test_a_file_of_one_s_own_goes_on_from_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("defaults:\n  - recipe/tulu2_70b\n  - _self_\nrun_dir: r\nmodel:\n  path: m\nseed: 7\n")
    config = load_config(str(path), [], command="run")
    assert (config.seed, config.model.tensor_model_parallel_size) == (7, 8)
    swapped = load_config(str(path), ["model/optim=adam"], command="run")
    assert swapped.model.optim.name == "adam"


@pytest.mark.parametrize(
    ("source", "more", "hint"),
    [
        ("zephyr_7b_paper", [], "did you mean `recipe/zephyr_7b_paper`?"),
        ("recipe/lama3_8b", [], "did you mean `recipe/llama3_8b`?"),
        (None, ["recipe=llama3_8b"], "use --config recipe/NAME"),
    ],
)
def test_a_recipe_that_is_named_wrongly(source: str | None, more: list[str], hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(source, more)
    assert hint in str(caught.value)
