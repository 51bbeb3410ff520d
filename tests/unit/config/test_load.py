"""Composition, overrides, and mistakes that are reported together."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_spin.config.compose import RECIPES, conf_dir, names
from nemo_spin.config.load import from_mapping, load_config, read_yaml, to_yaml
from nemo_spin.config.schema import Config, DataConfig
from nemo_spin.errors import ConfigError

GIVEN = ["run_dir=runs/x", "model.path=/models/m", "data.train=train.jsonl"]


def mistakes(*overrides: str, source: str | None = None, command: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides, command=command)
    return str(caught.value)


def test_the_base_configuration_shows_the_schema_s_defaults() -> None:
    assert load_config(None, []) == Config()
    assert load_config("spin", []) == Config()


def test_every_file_of_conf_composes_and_is_valid() -> None:
    assert names()
    for name in names():
        load_config(name, GIVEN, command="run")
    choices = [path for path in conf_dir().rglob("*/*.yaml") if path.parent != conf_dir() / RECIPES]
    assert {path.relative_to(conf_dir()).as_posix() for path in choices} >= {
        "model/optim/rmsprop.yaml",
        "model/optim/adam.yaml",
        "launcher/local.yaml",
        "launcher/slurm.yaml",
        "launcher/external.yaml",
        "evaluation/open_llm_leaderboard.yaml",
    }
    for path in choices:
        group = path.parent.relative_to(conf_dir()).as_posix()
        config = load_config(None, [*GIVEN, f"{group}={path.stem}"], command="run")
        if group == "evaluation":
            assert config.evaluation.benchmarks.tasks, path
            continue
        section = config
        for part in group.split("/"):
            section = getattr(section, part)
        assert section.name == path.stem  # type: ignore[attr-defined]


def test_overrides_of_all_kinds() -> None:
    config = load_config(
        None,
        [
            "model/optim=adam",
            "model.optim.betas=[0.8,0.95]",
            "spin.beta=[0.1,0.1,5]",
            "spin.lr=5e-6",
            "++spin.history=0",
            "+generation.stop_token_ids=[7]",
            "~model.optim.eps",
            "trainer.precision=32",
            "name=007",
            "data.max_rows=2e5",
            "model.recompute_granularity=null",
            "exp_manager.wandb_logger_kwargs.project=selfplay",
            "sft={lr: 1e-4, epochs: 2}",
            "run_dir='${name}/out'",
        ],
    )
    assert (config.model.optim.name, config.model.optim.betas, config.model.optim.eps) == (
        "adam",
        [0.8, 0.95],
        1e-8,
    )
    assert config.spin.beta == [0.1, 0.1, 5] and config.spin.lr == 5e-6 and config.spin.history == 0
    assert config.generation.stop_token_ids == [7]
    assert config.trainer.precision == "32" and config.name == "007"
    assert config.data.max_rows == 200_000 and isinstance(config.data.max_rows, int)
    assert config.exp_manager.wandb_logger_kwargs == {"project": "selfplay"}
    assert (config.sft.lr, config.sft.epochs, config.sft.output) == (1e-4, 2, "???")
    assert config.run_dir == "007/out"


@pytest.mark.parametrize(
    "text",
    [
        "~/data/a=b.jsonl",
        "### Instruction: {prompt}\n\n### Response: ",
        "it's & that",
        "a\\b;c",
        "C:\\d=e",
        "50%, or so#",
    ],
)
def test_texts_outside_hydra_s_grammar_are_taken_as_they_are(text: str) -> None:
    assert load_config(None, [f"data.train={text}"]).data.train == text


def test_a_file_anywhere_builds_on_ours(tmp_path: Path) -> None:
    directory = tmp_path / "my 'configs', v=2"
    directory.mkdir()
    file = directory / "my first.yaml"
    file.write_text(
        "defaults:\n  - spin\n  - extra: long\n  - _self_\n  - override model/optim: adam\n"
        "name: mine\nspin:\n  lr: 5e-6\nmodel:\n  optim:\n    weight_decay: 0.1\nevaluation:\n"
    )
    (directory / "extra").mkdir()
    (directory / "extra" / "long.yaml").write_text("# @package data\nmax_prompt_length: 4096\n")
    config = load_config(str(file), ["run_dir=r"])
    assert (config.name, config.run_dir, config.spin.lr) == ("mine", "r", 5e-6)
    assert (config.model.optim.name, config.model.optim.weight_decay) == ("adam", 0.1)
    assert config.data.max_prompt_length == 4096
    assert load_config(str(file), ["model/optim=rmsprop"]).model.optim.name == "rmsprop"


def test_a_file_without_defaults_list_stands_alone(tmp_path: Path) -> None:
    (tmp_path / "alone.yaml").write_text("spin:\n  iterations: 5\n")
    assert load_config(str(tmp_path / "alone.yaml"), []).spin.iterations == 5
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(str(tmp_path / "empty.yaml"), []) == Config()


def test_a_relative_path_and_nothing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    monkeypatch.chdir(tmp_path)
    assert load_config("mine.yaml", []).name == "mine"
    assert Path.cwd() == tmp_path
    assert os.listdir(tmp_path) == ["mine.yaml"]


def test_environment_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVICES", "4")
    monkeypatch.setenv("BETA", "0.5")
    monkeypatch.setenv("SP", "true")
    config = load_config(
        None,
        [
            "trainer.devices=${oc.env:DEVICES}",
            "spin.beta=${oc.env:BETA}",
            "model.sequence_parallel=${oc.env:SP}",
            "model.tensor_model_parallel_size=${trainer.devices}",
        ],
    )
    assert config.trainer.devices == 4 and config.spin.beta == 0.5 and config.model.sequence_parallel is True
    assert config.model.tensor_model_parallel_size == 4


def test_a_reference_to_a_missing_value_is_missing_too() -> None:
    assert load_config(None, ["sft.output=${run_dir}/sft"]).sft.output == "???"
    assert "sft.output: is not set" in mistakes(*GIVEN[1:], "sft.output=${run_dir}/sft", command="sft")


@pytest.mark.parametrize(
    ("override", "key", "guess"),
    [
        ("spin.bta=1", "spin.bta", "spin.beta"),
        ("modle.path=x", "modle", "model"),
        ("tensor_model_parallel_size=2", "tensor_model_parallel_size", "model.tensor_model_parallel_size"),
        ("model.tensor_parallel_size=2", "model.tensor_parallel_size", "model.tensor_model_parallel_size"),
        ("+generation.temprature=2", "generation.temprature", "generation.temperature"),
        (
            "model.optim.sched.warmup_ration=0.2",
            "model.optim.sched.warmup_ration",
            "model.optim.sched.warmup_ratio",
        ),
        ("model.optim={lr: 3}", "model.optim.lr", "spin.lr"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(override: str, key: str, guess: str) -> None:
    message = mistakes(override)
    assert message.startswith(f"{key}: unknown key (from the override {override!r})")
    assert f"did you mean `{guess}`?" in message


def test_an_unknown_key_like_none_lists_those_there_are() -> None:
    message = mistakes("launcher.zzz=1")
    assert (
        "the keys of `launcher` are name, timeout_s, collective_timeout_s, hang_timeout_s, attempts"
        in message
    )


def test_unknown_keys_in_files_and_groups_are_found(tmp_path: Path) -> None:
    (tmp_path / "model" / "optim").mkdir(parents=True)
    (tmp_path / "model" / "optim" / "mine.yaml").write_text("name: adam\nepsilon: 1e-8\n")
    file = tmp_path / "f.yaml"
    file.write_text("defaults:\n  - model/optim: mine\n  - _self_\nspin:\n  betas: 3\n7: x\n")
    message = mistakes(source=str(file))
    assert message.startswith("3 mistakes in the configuration")
    assert "model.optim.epsilon: unknown key" in message
    assert "spin.betas: unknown key\n" in message and "did you mean `spin.beta`?" in message
    assert "- 7: unknown key" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("spin.iterations=two", "spin.iterations: 'two' (from the override 'spin.iterations=two')"),
        ("spin.iterations=two", "must be a whole number"),
        ("spin.iterations=1.5", "must be a whole number"),
        ("spin.iterations=true", "must be a whole number"),
        ("spin.iterations=null", "spin.iterations: null"),
        ("spin.iterations=two", "such as its default, 3"),
        ("sft.lr=fast", "must be a number"),
        ("model.sequence_parallel=1", "must be true or false"),
        ("model.recompute_granularity=false", "must be a text or null"),
        ("data.max_rows=[1]", "must be a whole number or null"),
        ("model.optim.betas=0.9", "must be a list, each value a number"),
        ("model.optim.betas=[0.9,x]", "must be a list, each value a number"),
        ("exp_manager.wandb_logger_kwargs=3", "must be a mapping"),
        ("run_dir=true", "give run_dir a value of that kind"),
        ("data.train.file=x", "data.train: {'file': 'x'}"),
        ("spin=3", "spin: 3 (from the override 'spin=3')\n  rule:   is a section, with the keys iterations,"),
        ("seed=${oc.env:NO_SUCH_VARIABLE}", "Environment variable 'NO_SUCH_VARIABLE' not found"),
        ("seed=${nope}", "seed: ${nope}"),
        ("spin.beta=1,2", "write spin.beta=[…] with brackets"),
        ("spin.beta=[1", "override 'spin.beta=[1': cannot be read"),
        ("spin.beta", "write key=value"),
        ("=3", "has no key"),
        ("~spin.nope", "there is no such key"),
        ("model/optim=adm", "did you mean `adam`?"),
        ("modl/optim=adam", "did you mean `model/optim`?"),
        ("launcher=slrm", "the group 'launcher' has no file 'slrm'"),
    ],
)
def test_what_cannot_be_used_is_named_with_rule_and_remedy(override: str, expected: str) -> None:
    message = mistakes(override)
    assert expected in message
    assert "  rule:   " in message and "  remedy: " in message
    assert len(message.splitlines()) == 3


def test_a_dotted_key_in_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "dotted.yaml").write_text("spin.beta: 1\nmodel:\n  optim.name: adam\n")
    message = mistakes(source=str(tmp_path / "dotted.yaml"))
    assert "- spin.beta: is one key, 'spin.beta'" in message
    assert "- model.optim.name: is one key, 'optim.name'" in message
    assert "nested mappings" in message


def test_a_resolved_configuration_can_be_started_from(tmp_path: Path) -> None:
    config = load_config(None, [*GIVEN, "data.prompt_template=Q: {prompt}\n\nA: "])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "config.yaml"), []) == config


def test_mistakes_of_all_kinds_come_together() -> None:
    message = mistakes(
        "spin.bta=1",
        "spin.lr=[1e-6,1e-6]",
        "trainer.devices=x",
        "seed=-1",
        "a.b",
        "model/optim=adm",
        "spin.loss=hinged",
        "model.global_batch_size=63",
        command="run",
    )
    starts = [line[2:].split(":")[0] for line in message.splitlines() if line.startswith("- ")]
    assert sorted(starts) == sorted(
        [
            "override 'model/optim=adm'",
            "override 'a.b'",
            "trainer.devices",
            "spin.bta",
            "run_dir",
            "model.path",
            "data.train",
            "seed",
            "spin.loss",
            "spin.lr",
        ]  # not model.global_batch_size: what it must divide by is not known
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"- a\n- b\n", "not a mapping"),
        (b"spin: [1\n", "line 2"),
        (b"spin:\n  beta: 1\n  beta: 2\n", "duplicate key beta"),
        (b"name: \xff\n", "can't decode byte 0xff"),
        (b"defaults:\n  - nothing\n  - _self_\n", "nothing"),
        (b"defaults:\n  - model/optim: adm\n  - _self_\n", "adam; rmsprop"),
        (b"defaults:\n  - broken\n  - _self_\n", "include the file itself"),
        (b"name: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
    ],
)
def test_a_file_that_cannot_be_composed_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    message = mistakes("a.b", source=str(file))
    assert message.startswith("2 mistakes") and "override 'a.b'" in message
    assert f"- {file}: " in message and expected in message
    assert "Config search path" not in message


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    assert "did you mean `spin`?" in mistakes(source="spinn")
    assert "there is no such file" in mistakes(source=str(tmp_path / "x.yaml"))
    assert "is not a file" in mistakes(source=str(tmp_path))
    (tmp_path / "x.yml").write_text("name: x\n")
    assert "has the ending '.yml', not '.yaml'" in mistakes(source=str(tmp_path / "x.yml"))


def test_the_resolved_file_reads_back_the_same(tmp_path: Path) -> None:
    config = load_config(None, [*GIVEN, "spin.beta=[0.1,0.2,5]", "model.optim.eps=1e-15"])
    config.data.prompt_template = "### Instruction: {prompt}\n\n### Response: "
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert read_yaml(path) == config
    assert '"### Instruction: {prompt}\\n\\n### Response: "' in to_yaml(config)
    assert list(dataclasses.asdict(config)) == [
        line[:-1].split(":")[0] for line in to_yaml(config).splitlines() if line[0] not in " -"
    ]


@settings(deadline=None, max_examples=300)
@given(st.text(), st.floats(allow_nan=False, allow_infinity=False), st.lists(st.integers()))
def test_any_value_survives_the_resolved_file(
    tmp_path_factory: pytest.TempPathFactory, text: str, number: float, ids: list[int]
) -> None:
    config = Config(data=DataConfig(prompt_template=text, system_prompt="${x} " + text))
    config.spin.beta = [number]
    config.sft.lr = number
    config.generation.stop_token_ids = ids
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    if text != "???":
        assert read_yaml(path) == config


def test_a_damaged_resolved_file_is_a_typed_error(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for content, expected in [
        ("spin: [", "config.yaml"),
        ("3", "is not a YAML mapping"),
        ("spun: 3", "unknown key"),
    ]:
        path.write_text(content)
        with pytest.raises(ConfigError, match=expected):
            read_yaml(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")


def test_a_script_s_own_mapping() -> None:
    assert from_mapping({"spin": {"iterations": 2}}).spin.iterations == 2
    with pytest.raises(ConfigError, match=r"spin\.iteration: unknown key"):
        from_mapping({"spin": {"iteration": 2}})


def test_composing_inside_another_hydra_application_leaves_it_alone(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    (tmp_path / "theirs.yaml").write_text("a: 1\n")
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        load_config(None, [])
        assert compose("theirs") == {"a": 1}
    assert not GlobalHydra.instance().is_initialized()


def test_loading_imports_nothing_heavy() -> None:
    code = (
        "import sys; from nemo_spin.config.load import load_config; load_config(None, [], command=None)\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'numpy', 'nemo', 'vllm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
