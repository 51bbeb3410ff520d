from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import pytest

from nemo_spin.config.load import from_mapping
from nemo_spin.config.rules import GUARDS
from nemo_spin.config.schema import Config, SlurmConfig
from nemo_spin.selfplay.inputs import (
    KEYS,
    PER_ITERATION,
    config_differences,
    config_inputs,
    differences,
    flatten,
    refuse,
)

# Keys that change no result: where, how fast and under which name. A new key of the schema
# must be put here or into `KEYS` (or into `prepare_inputs`, for `data.*`).
WITHOUT_EFFECT = {
    "name",
    "run_dir",
    "model.path",  # the hashes of its files count
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "model.context_parallel_size",
    "model.expert_model_parallel_size",
    "model.sequence_parallel",
    "model.transformer_impl",
    "model.micro_batch_size",
    "model.micro_batch_tokens",
    "model.packing",
    "model.num_layers_in_first_pipeline_stage",
    "model.num_layers_in_last_pipeline_stage",
    "model.account_for_embedding_in_pipeline_split",
    "model.account_for_loss_in_pipeline_split",
    "model.recompute_granularity",
    "model.recompute_modules",
    "model.recompute_method",
    "model.recompute_num_layers",
    "model.overlap_grad_reduce",
    "model.overlap_param_gather",
    "model.use_distributed_optimizer",
    "model.optimizer_cpu_offload",
    "model.optimizer_offload_fraction",
    "spin.iterations",
    "spin.per_iteration",  # what it changes counts under its own key
    "selfplay.stop",
    "selfplay.keep",
    "selfplay.guards.window_steps",
    *(f"selfplay.guards.{guard}.{level}" for guard in GUARDS for level in ("warn", "stop")),
    "spin.gates.ln2_tolerance",
    "spin.gates.sampler_tolerance",
    "spin.gates.sampler",
    "spin.gates.export",
    "sft.output",
    "export.checkpoint",  # the hash of its files counts
    "export.output",
    "generation.python",
    "generation.server",
    "generation.server_timeout_s",
    "generation.tensor_parallel_size",
    "generation.replicas",
    "generation.replica_attempts",
    "generation.lease_timeout_s",
    "generation.shard_rows",
    "generation.max_num_seqs",
    "generation.kv_cache_gib",
    "generation.keep_engine",
    "generation.load_timeout_s",
    "generation.shard_timeout_s",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "trainer.log_every_n_steps",
    "trainer.val_check_interval",
    "trainer.save_interval",
    "trainer.save_top_k",
    "trainer.async_save",
    "exp_manager.create_tensorboard_logger",
    "exp_manager.create_wandb_logger",
    "exp_manager.wandb_logger_kwargs",
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end",
    "launcher.name",
    "launcher.timeout_s",
    "launcher.collective_timeout_s",
    "launcher.hang_timeout_s",
    "launcher.attempts",
    "launcher.backoff_s",
    "launcher.preemption_grace_s",
    "launcher.omp_num_threads",
    "launcher.join_timeout_s",
    "launcher.silence_timeout_s",
    *(f"launcher.slurm.{field.name}" for field in fields(SlurmConfig)),
    "evaluation.enabled",
    "evaluation.benchmarks.include_path",  # the hashes of its files count
    "evaluation.benchmarks.timeout_s",
}


def leaves(config: Config) -> set[str]:
    keys = set()
    for section, value in asdict(config).items():
        keys |= set(flatten(value or "", section))
    return keys


def test_every_key_of_the_schema_is_decided_upon() -> None:
    used = {leaf for stage in KEYS for leaf in config_inputs(Config(), stage, 0)}
    data = {key for key in leaves(Config()) if key.startswith("data.")}
    undecided = leaves(Config()) - used - data - WITHOUT_EFFECT
    assert undecided == set()
    assert used & WITHOUT_EFFECT == set()


def test_of_a_list_only_the_value_of_the_iteration() -> None:
    config = from_mapping({"spin": {"iterations": 2, "beta": [0.1, 5.0], "lr": 1e-4}})
    assert config_inputs(config, "train", 0)["spin.beta"] == 0.1
    assert config_inputs(config, "train", 1)["spin.beta"] == 5.0
    assert config_inputs(config, "train", 1)["spin.lr"] == 1e-4


def test_sections_are_taken_key_by_key() -> None:
    inputs = config_inputs(Config(), "train", 0)
    assert inputs["model.optim.sched.warmup_ratio"] == 0.1
    assert inputs["model.optim.betas"] == [0.9, 0.999]


def test_keys_per_iteration_are_those_the_validation_knows() -> None:
    from nemo_spin.config.rules import PER_ITERATION as VALIDATED

    assert set(VALIDATED) == PER_ITERATION


class TestDifferences:
    def test_in_words(self) -> None:
        was = {"config": {"spin.beta": 0.1, "old": 1}, "opponent": "a" * 64, "generated": {"iter_00": "x"}}
        now = {"config": {"spin.beta": 1.0, "new": [1]}, "opponent": "b" * 64, "generated": {"iter_00": "x"}}
        words = [difference.words for difference in differences("train of iteration 0", was, now)]
        assert words == [
            "spin.beta: was 0.1, is 1.0",
            "new: was not there, is [1]",
            "old: was 1, is not there",
            f"opponent: was {'a' * 12}…, is {'b' * 12}…",
        ]

    def test_none_is_a_value(self) -> None:
        found = differences("prepare", {"config": {"a": None}}, {"config": {"a": 1}}, prefix="data.")
        assert [difference.words for difference in found] == ["data.a: was null, is 1"]

    def test_a_younger_key_at_its_default_is_no_difference(self) -> None:
        was = {"config": {"spin.loss": "logistic"}}
        now = {"config": {"spin.loss": "logistic", "spin.beta": 0.1}}
        assert differences("train of iteration 0", was, now) == []
        now["config"]["spin.beta"] = 0.2
        assert [entry.words for entry in differences("train of iteration 0", was, now)] == [
            "spin.beta: was not there, is 0.2"
        ]

    def test_tuples_and_lists_are_the_same(self) -> None:
        assert differences("train", {"config": {"a": [1, 2]}}, {"config": {"a": (1, 2)}}) == []

    def test_a_message_names_stage_and_directories(self) -> None:
        found = differences("train of iteration 0", {"config": {"a": 1}}, {"config": {"a": 2}})
        message = str(refuse(Path("/runs/a b"), found, [Path("/runs/a b/iter_00/train")]))
        assert "a: was 1, is 2  (train of iteration 0)" in message
        assert "rm -r '/runs/a b/iter_00/train'" in message

    def test_between_configurations(self) -> None:
        assert config_differences(Config(), Config()) == []
        other = from_mapping({"spin": {"iterations": 4}, "name": "b"})
        assert config_differences(Config(), other) == [
            'name: was "spin", is "b"',
            "spin.iterations: was 3, is 4",
        ]


@pytest.mark.parametrize("stage", KEYS)
def test_every_declared_key_exists(stage: str) -> None:
    assert config_inputs(Config(), stage, 0)
