from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.config.load import read_yaml
from nemo_spin.config.schema import Config
from nemo_spin.data.files import read_manifest
from nemo_spin.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    GateError,
    GuardError,
    PreemptedError,
    StageError,
)
from nemo_spin.selfplay import loop
from nemo_spin.selfplay.run_directory import RunDirectory
from nemo_spin.selfplay.screen import Screen
from nemo_spin.selfplay.signals import STOPPED
from nemo_spin.selfplay.stages.generate import GenerateStage
from nemo_spin.selfplay.state import read_state
from nemo_spin.selfplay.status import describe
from tests import models
from tests.functional.conftest import TinyData
from tests.unit.bridge.checkpoints import make_checkpoint
from tests.unit.selfplay.conftest import COUNTS, StandIns

STOPPED_BY = (SystemExit(75), PreemptedError("saved after step 3 of 9"))
CHECK_OF_GENERATE = GenerateStage.check  # which `stand_ins` takes away
Run = Callable[[Config], str]
MakeConfig = Callable[..., Config]

ALL = [
    "evaluate of theta_0",
    *[
        f"{stage} of iteration {iteration}"
        for iteration in (0, 1)
        for stage in ("generate", "score", "train", "export", "evaluate")
    ],
]


def results(run_dir: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run_dir)): path.read_text()
        for path in sorted(run_dir.rglob("result"))
        if "opponent/" not in str(path)
    }


def sampling_of(stage_directory: Path) -> tuple[float, int, int]:
    """Temperature, top_k and max_tokens that the result in it was made with."""
    manifest = read_manifest(stage_directory)
    assert manifest is not None
    values = manifest.inputs["config"]
    return tuple(values[f"generation.{key}"] for key in ("temperature", "top_k", "max_tokens"))  # type: ignore[return-value]


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def test_runs_every_stage_in_order_and_then_none(
    run: Run, make_config: MakeConfig, stand_ins: StandIns, directory: RunDirectory
) -> None:
    first = run(make_config())
    assert stand_ins.started == ALL
    assert "prepare: 48 train rows" in first
    assert "Iteration 1" in first
    assert "theta_2" in first
    before = results(directory.path)
    second = run(make_config())
    assert stand_ins.started == []
    assert "theta_2" in second
    assert results(directory.path) == before
    assert "done" in describe(directory.path).splitlines()[0]


def test_prepare_says_on_screen_which_rows_exceed_a_microbatch(
    run: Run, make_config: MakeConfig, directory: RunDirectory
) -> None:
    screen = run(make_config(model={"micro_batch_tokens": 1}))
    assert "48 of 48 rows may become longer than model.micro_batch_tokens=1" in " ".join(screen.split())
    assert "48 may exceed model.micro_batch_tokens" in " ".join(screen.split())
    manifest = read_manifest(directory.data_dir)
    assert manifest is not None and manifest.counts["train"]["overlong"]["certain"] == 48


def test_prepare_says_on_screen_what_the_data_shows(
    run: Run, make_config: MakeConfig, stand_ins: StandIns, tiny_data: TinyData
) -> None:
    config = make_config(generation={"max_tokens": 1}, data={"heldout": str(tiny_data.train)})
    fine_tuning = StringIO()
    loop.run_sft(config, launcher=stand_ins, screen=Screen(fine_tuning))
    screens = [" ".join(text.split()) for text in (run(config), fine_tuning.getvalue())]
    for screen in screens:
        assert "heldout: 48 of 48 prompts are in data.train too" in screen
    # Plain fine-tuning has no answers that could be shorter.
    assert ["longer than generation.max_tokens=1" in screen for screen in screens] == [True, False]


def test_the_opponent_is_the_model_before(
    run: Run, make_config: MakeConfig, directory: RunDirectory, tiny_model: Path
) -> None:
    run(make_config())
    assert directory.iteration(0).opponent.resolve() == tiny_model.resolve()
    assert directory.iteration(1).opponent.resolve() == directory.iteration(0).model
    assert not directory.iteration(1).opponent.readlink().is_absolute()


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        *((stage, KeyboardInterrupt()) for stage in ALL),
        *((ALL[3], error) for error in (*STOPPED_BY, DataError("full"), RuntimeError("bug"))),
    ],
)
def test_goes_on_where_it_was_stopped(
    run: Run,
    make_config: MakeConfig,
    stand_ins: StandIns,
    directory: RunDirectory,
    *,
    stage: str,
    error: BaseException,
) -> None:
    stand_ins.fail_in, stand_ins.error = stage, error
    with pytest.raises(type(error)):
        run(make_config())
    assert stand_ins.started[-1] == stage
    state = read_state(directory.state_path)
    assert state is not None
    assert state.status == ("interrupted" if isinstance(error, STOPPED) else "failed")
    assert stage.partition(" of ")[0] in describe(directory.path).splitlines()[0]
    assert not directory.lock_path.exists()

    stand_ins.fail_in = None
    run(make_config())
    assert stand_ins.started == ALL[ALL.index(stage) :]
    interrupted = results(directory.path)
    shutil.rmtree(directory.path)
    run(make_config())
    assert results(directory.path) == interrupted


def test_a_job_that_ends_without_a_word(
    run: Run, make_config: MakeConfig, stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.unit.selfplay.conftest import StandInJob

    monkeypatch.setattr(stand_ins, "start", lambda job: StandInJob(137))
    with pytest.raises(StageError, match=r"score of iteration 0: ended with exit code 137.*\nlog: nowhere"):
        run(make_config())


@pytest.mark.parametrize(
    ("words", "kind"),
    [("OSError: [Errno 28] torn", DataError), ("Disk quota exceeded", DataError), ("a bug", StageError)],
)
def test_a_full_disk_is_recognised_in_what_a_job_says(
    run: Run,
    make_config: MakeConfig,
    stand_ins: StandIns,
    monkeypatch: pytest.MonkeyPatch,
    *,
    words: str,
    kind: type[Exception],
) -> None:
    from tests.unit.selfplay.conftest import StandInJob

    monkeypatch.setattr(stand_ins, "start", lambda job: StandInJob(1))
    monkeypatch.setattr(StandInJob, "describe_failure", lambda job: words)
    with pytest.raises(kind):
        run(make_config())


def test_a_full_disk_in_this_process(run: Run, make_config: MakeConfig, stand_ins: StandIns) -> None:
    stand_ins.fail_in = "generate of iteration 0"
    stand_ins.error = OSError(28, "No space left on device", "/runs/shard")
    with pytest.raises(DataError, match=r"/runs/shard: could not be written \(No space left on device\)"):
        run(make_config())
    stand_ins.error = OSError(9, "Bad file descriptor")  # a defect
    with pytest.raises(OSError, match="Bad file descriptor"):
        run(make_config())


class TestChangedConfiguration:
    def test_what_matters_to_a_finished_stage_is_refused(
        self, run: Run, make_config: MakeConfig, directory: RunDirectory
    ) -> None:
        run(make_config())
        before, config_before = results(directory.path), directory.config_path.read_text()
        with pytest.raises(ConfigError) as caught:
            run(make_config(spin={"beta": 1.0}))
        message = str(caught.value)
        assert "spin.beta: was 0.1, is 1.0  (train of iteration 0)" in message
        assert "spin.beta: was 0.1, is 1.0  (train of iteration 1)" in message
        assert str(directory.iteration(0).train) in message
        assert message.endswith(f" {directory.iteration(1).path}")
        assert str(directory.iteration(0).scored) not in message
        assert results(directory.path) == before
        assert directory.config_path.read_text() == config_before

    def test_removing_what_is_named_lets_it_go_on(
        self, run: Run, make_config: MakeConfig, stand_ins: StandIns
    ) -> None:
        run(make_config())
        changed = make_config(spin={"lr": [1e-4, 9e-4]})
        with pytest.raises(ConfigError) as caught:
            run(changed)
        command = str(caught.value).rpartition("rm -r ")[2]
        for path in command.split():
            shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
        run(changed)
        assert stand_ins.started == [f"{stage} of iteration 1" for stage in ("train", "export", "evaluate")]

    def test_a_later_iteration_may_change(
        self, run: Run, make_config: MakeConfig, stand_ins: StandIns
    ) -> None:
        stand_ins.fail_in, stand_ins.error = "generate of iteration 1", KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            run(make_config())
        stand_ins.fail_in = None
        run(make_config(spin={"lr": [1e-4, 5e-4], "beta": [0.1, 2.0]}))
        assert stand_ins.started[0] == "generate of iteration 1"

    def test_every_model_is_evaluated_as_in_iteration_0(
        self, run: Run, make_config: MakeConfig, stand_ins: StandIns, directory: RunDirectory
    ) -> None:
        changes = {"1": {"generation.top_k": 50, "generation.max_tokens": 99}}
        config = make_config(generation={"temperature": [0.5, 1.0]}, spin={"per_iteration": changes})
        run(config)
        own, evaluated = [], []
        for iteration in (0, 1):
            files = directory.iteration(iteration)
            own.append(sampling_of(files.generated))
            evaluated.append(sampling_of(files.evaluation))
        assert own == [(0.5, 0, 256), (1.0, 50, 99)]
        assert {sampling_of(directory.iteration(0).opponent_evaluation), *evaluated} == {own[0]}
        run(make_config(generation={"temperature": [0.5, 1.0]}, spin={"per_iteration": changes}))
        assert stand_ins.started == []

    def test_more_iterations_go_on_from_a_finished_run(
        self, run: Run, make_config: MakeConfig, stand_ins: StandIns, directory: RunDirectory
    ) -> None:
        run(make_config())
        text = run(make_config(spin={"iterations": 3, "lr": [1e-4, 2e-4, 3e-4], "beta": [0.1, 0.1, 5.0]}))
        assert stand_ins.started == [
            f"{stage} of iteration 2" for stage in ("generate", "score", "train", "export", "evaluate")
        ]
        assert "config.yaml: spin.iterations: was 2, is 3" in text
        assert read_yaml(directory.config_path).spin.iterations == 3

    def test_what_matters_to_nothing_is_accepted(
        self, run: Run, make_config: MakeConfig, stand_ins: StandIns, directory: RunDirectory
    ) -> None:
        run(make_config())
        run(
            make_config(
                name="other",
                generation={"max_num_seqs": 3, "shard_rows": 7},
                trainer={"log_every_n_steps": 5, "devices": 2},
                launcher={"timeout_s": 60.0},
                model={"tensor_model_parallel_size": 2, "micro_batch_size": 2},
            )
        )
        assert stand_ins.started == []
        assert read_yaml(directory.config_path).name == "other"

    def test_an_unfinished_stage_is_not_gone_on_with(
        self, run: Run, make_config: MakeConfig, stand_ins: StandIns, directory: RunDirectory
    ) -> None:
        stand_ins.fail_in, stand_ins.error = "train of iteration 0", KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            run(make_config())
        stand_ins.fail_in = None
        with pytest.raises(ConfigError, match=r"spin\.epochs: was 2, is 3"):
            run(make_config(spin={"epochs": 3}))
        assert (directory.iteration(0).train / "half").exists()
        run(make_config())

    def test_a_scorer_concerns_evaluations_alone(
        self, run: Run, make_config: MakeConfig, directory: RunDirectory, tmp_path: Path
    ) -> None:
        run(make_config())
        scorer = tmp_path / "scorer.py"
        scorer.write_text("def score(prompt, real, response): return 0.0\n")
        with pytest.raises(ConfigError) as caught:
            run(make_config(evaluation={"scorer": f"{scorer}:score"}))
        message = str(caught.value)
        assert "evaluation.scorer: was null, is" in message
        assert str(directory.iteration(1).evaluation) in message
        assert str(directory.iteration(0).train) not in message

    def test_other_demonstrations(
        self, run: Run, make_config: MakeConfig, directory: RunDirectory, tmp_path: Path
    ) -> None:
        run(make_config())
        other = models.write_demonstrations(tmp_path / "other.jsonl", 48, seed=7)
        with pytest.raises(ConfigError) as caught:
            run(make_config(data={"train": str(other), "max_prompt_length": 100}))
        message = str(caught.value)
        assert "data.max_prompt_length: was 1024, is 100  (prepare)" in message
        assert "train: was" in message
        assert str(directory.data_dir) in message
        assert str(directory.iteration(0).opponent_evaluation) in message

    def test_other_weights_under_the_same_path(
        self, run: Run, make_config: MakeConfig, tiny_model: Path, tmp_path: Path
    ) -> None:
        model = tmp_path / "model"
        shutil.copytree(tiny_model, model)
        run(make_config(model={"path": str(model)}))
        models.write_model(model, seed=5)
        with pytest.raises(ConfigError, match=r"opponent: was .*  \(generate of iteration 0\)"):
            run(make_config(model={"path": str(model)}))


class TestDamage:
    def test_a_damaged_file_of_a_finished_stage(
        self, run: Run, make_config: MakeConfig, directory: RunDirectory
    ) -> None:
        run(make_config())
        path = directory.iteration(0).scored / "result"
        path.write_text(path.read_text().replace("a", "b").replace("c", "d"))
        with pytest.raises(DataError, match=r"scored/result: has sha256"):
            run(make_config())

    def test_a_truncated_file(self, run: Run, make_config: MakeConfig, directory: RunDirectory) -> None:
        run(make_config())
        (directory.data_dir / "train.parquet").write_bytes(b"PAR1")
        with pytest.raises(DataError, match=r"train.parquet: has 4 bytes"):
            run(make_config())

    def test_a_damaged_manifest(self, run: Run, make_config: MakeConfig, directory: RunDirectory) -> None:
        run(make_config())
        (directory.iteration(1).generated / "manifest.json").write_text('{"stage": ')
        with pytest.raises(DataError, match="is not a manifest"):
            run(make_config())

    def test_a_result_that_was_removed_is_made_again(
        self, run: Run, make_config: MakeConfig, stand_ins: StandIns, directory: RunDirectory
    ) -> None:
        run(make_config())
        before = results(directory.path)
        shutil.rmtree(directory.iteration(0).train)
        run(make_config())
        assert stand_ins.started == ["train of iteration 0"]
        assert results(directory.path) == before

    def test_half_a_result_without_a_word_on_its_inputs_is_removed(
        self, run: Run, make_config: MakeConfig, directory: RunDirectory
    ) -> None:
        scored = directory.iteration(0).scored
        scored.mkdir(parents=True)
        (scored / "unknown").write_text("from nowhere")
        run(make_config())
        assert not (scored / "unknown").exists()

    def test_a_lost_state_loses_nothing(
        self, run: Run, make_config: MakeConfig, stand_ins: StandIns, directory: RunDirectory
    ) -> None:
        run(make_config())
        directory.state_path.write_text("{")
        directory.verified_path.write_text("]")
        run(make_config())
        assert stand_ins.started == []


class TestOneStage:
    def run_stage(self, config: Config, stand_ins: StandIns, stage: str, iteration: int | None = None) -> str:
        stand_ins.started.clear()
        stream = StringIO()
        loop.run_stage(config, stage, iteration=iteration, launcher=stand_ins, screen=Screen(stream))
        return stream.getvalue()

    def test_stage_by_stage_gives_what_run_gives(
        self, run: Run, make_config: MakeConfig, stand_ins: StandIns, directory: RunDirectory
    ) -> None:
        config = make_config()
        for stage in ("prepare", "evaluate", *["generate", "score", "train", "export", "evaluate"] * 2):
            self.run_stage(config, stand_ins, stage)
        assert "nothing is running" in describe(directory.path)
        single = results(directory.path)
        assert len(single) == 11
        run(config)
        assert stand_ins.started == []
        shutil.rmtree(directory.path)
        run(config)
        assert results(directory.path) == single

    def test_a_stage_needs_the_one_before(self, make_config: MakeConfig, stand_ins: StandIns) -> None:
        with pytest.raises(ConfigError, match=r"prepare has not been done"):
            self.run_stage(make_config(), stand_ins, "generate")
        self.run_stage(make_config(), stand_ins, "prepare")
        with pytest.raises(ConfigError, match=r"score of iteration 0 has not been done"):
            self.run_stage(make_config(), stand_ins, "train")
        with pytest.raises(ConfigError, match=r"export of iteration 0 has not been done"):
            self.run_stage(make_config(), stand_ins, "generate", iteration=1)

    def test_an_iteration_that_is_not_configured(self, make_config: MakeConfig, stand_ins: StandIns) -> None:
        with pytest.raises(ConfigError, match=r"--iteration: 2"):
            self.run_stage(make_config(), stand_ins, "generate", iteration=2)

    def test_import(self, make_config: MakeConfig, stand_ins: StandIns, directory: RunDirectory) -> None:
        self.run_stage(make_config(), stand_ins, "import-hf")
        assert stand_ins.started == ["import-hf"]
        assert read_manifest(directory.imported_dir) is not None


class TestFineTuning:
    def test_writes_a_run_directory_of_its_own(
        self, make_config: MakeConfig, stand_ins: StandIns, tmp_path: Path
    ) -> None:
        for expected in (["sft", "export"], []):
            stand_ins.started.clear()
            loop.run_sft(make_config(), launcher=stand_ins, screen=Screen(StringIO()))
            assert stand_ins.started == expected
        assert (tmp_path / "sft" / "model" / "config.json").exists()
        assert not (tmp_path / "run").exists()
        assert "sft done" in describe(tmp_path / "sft")

    def test_other_settings_are_refused(self, make_config: MakeConfig, stand_ins: StandIns) -> None:
        loop.run_sft(make_config(), launcher=stand_ins, screen=Screen(StringIO()))
        with pytest.raises(ConfigError, match=r"sft\.lr: was"):
            loop.run_sft(make_config(sft={"lr": 3e-3}), launcher=stand_ins, screen=Screen(StringIO()))


class TestBeforeAnythingStarts:
    def test_a_missing_model(self, run: Run, make_config: MakeConfig, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="there is no such directory"):
            run(make_config(model={"path": str(tmp_path / "nowhere")}))
        assert not (tmp_path / "run").exists()

    def test_a_truncated_model(
        self, run: Run, make_config: MakeConfig, tiny_model: Path, tmp_path: Path, stand_ins: StandIns
    ) -> None:
        model = tmp_path / "model"
        shutil.copytree(tiny_model, model)
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            run(make_config(model={"path": str(model)}))
        assert stand_ins.started == []
        assert not (tmp_path / "run").exists()

    def test_sizes_that_do_not_divide(self, run: Run, make_config: MakeConfig, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="does not divide the model's 2 key/value heads"):
            run(make_config(model={"tensor_model_parallel_size": 4}, trainer={"devices": 4}))
        assert not (tmp_path / "run").exists()

    def test_a_model_that_vllm_cannot_sample(
        self,
        run: Run,
        make_config: MakeConfig,
        stand_ins: StandIns,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        monkeypatch.setattr(GenerateStage, "check", CHECK_OF_GENERATE)
        model = make_checkpoint(tmp_path / "model", "gpt_neo")
        models.write_tokenizer(model)
        with pytest.raises(ConfigError, match=r"model\.path=.*: vLLM has no GPT-Neo"):
            run(
                make_config(
                    model={"path": str(model)},
                    data={"max_prompt_length": 20, "max_response_length": 20},
                    generation={"max_tokens": 20},
                )
            )
        assert stand_ins.started == []

    def test_a_run_directory_that_is_a_file(self, run: Run, make_config: MakeConfig, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="cannot be made"):
            run(make_config(run_dir=str(tmp_path / "file")))


def test_errors_of_ranks_keep_their_type(run: Run, make_config: MakeConfig, stand_ins: StandIns) -> None:
    stand_ins.fail_in, stand_ins.error = "train of iteration 0", GateError("ln 2 gate: 0.9")
    with pytest.raises(GateError, match=r"^ln 2 gate: 0\.9$"):
        run(make_config())


def test_state_counts_attempts_and_seconds(
    run: Run, make_config: MakeConfig, stand_ins: StandIns, directory: RunDirectory
) -> None:
    stand_ins.fail_in, stand_ins.error = "train of iteration 1", KeyboardInterrupt()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(make_config())
    stand_ins.fail_in = None
    run(make_config())
    stages = json.loads(directory.state_path.read_text())["stages"]
    assert stages["iter_01/train"]["attempts"] == 3
    assert stages["iter_00/train"]["attempts"] == 1
    assert all(entry["status"] == "done" and entry["seconds"] >= 0 for entry in stages.values())


def test_optimizer_state_of_the_iteration_before_is_an_input_if_it_carries_over(
    run: Run, make_config: MakeConfig, directory: RunDirectory
) -> None:
    def inputs(iteration: int) -> dict[str, object]:
        manifest = read_manifest(directory.iteration(iteration).train)
        assert manifest is not None
        return dict(manifest.inputs)

    run(make_config(model={"optim": {"carry_over": True}}))
    first = read_manifest(directory.iteration(0).train)
    assert first is not None
    assert "optimizer" not in inputs(0) and inputs(1)["optimizer"] == first.sha256()
    shutil.rmtree(directory.path)
    run(make_config())
    assert "optimizer" not in inputs(1)


def test_a_guard_ends_the_loop_and_the_best_model_is_kept(
    run: Run,
    make_config: MakeConfig,
    stand_ins: StandIns,
    directory: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
) -> None:
    fine = COUNTS["evaluate"]
    worse_sampled = {**fine, "sampled": {**fine["sampled"], "score": 0.25}}
    work = stand_ins.work

    def worse(label: str, *arguments: Any, **named: Any) -> None:
        is_worse = label.startswith("evaluate of iteration")
        monkeypatch.setitem(COUNTS, "evaluate", worse_sampled if is_worse else fine)
        work(label, *arguments, **named)

    monkeypatch.setattr(stand_ins, "work", worse)
    with pytest.raises(GuardError, match=r"evaluate of iteration 0: guard score_drop: .* fell by 50\.0%"):
        run(make_config())
    assert stand_ins.started == ALL[:6], "iteration 1 is not begun"
    assert directory.kept.resolve() == tiny_model.resolve()
    assert "stopped by a guard after evaluate of iteration 0" in describe(directory.path)
    found = json.loads(directory.iteration(0).guards_path.read_text())
    assert [entry["guard"] for entry in found["evaluate"]] == ["score_drop"]
    with pytest.raises(GuardError):  # it stands where it stood
        run(make_config())
    assert stand_ins.started == []
    screen = run(make_config(selfplay={"stop": False}))
    assert stand_ins.started == ALL[6:]
    words = " ".join(screen.split())
    assert "kept: theta_0 (best: held-out score (sampled))" in words
    assert "its held-out scores: sampled 0.500, greedy 0.750" in words


def test_a_guard_in_training_ends_the_loop(
    run: Run, make_config: MakeConfig, stand_ins: StandIns, directory: RunDirectory
) -> None:
    stand_ins.fail_in, stand_ins.error = "train of iteration 1", GuardError("guard real_fall: fell")
    with pytest.raises(GuardError):
        run(make_config(selfplay={"keep": "last"}))
    assert directory.kept.resolve() == directory.iteration(0).model
    assert "failed in train of iteration 1" in describe(directory.path)


@pytest.mark.parametrize(("temperature", "guards"), [([1.0, 1.0], ["equal_fall"]), ([0.5, 1.0], [])])
def test_answers_are_compared_with_those_before_where_they_were_drawn_alike(
    run: Run,
    make_config: MakeConfig,
    stand_ins: StandIns,
    directory: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    *,
    temperature: list[float],
    guards: list[str],
) -> None:
    counts, work = COUNTS["generate"], stand_ins.work
    fewer = {**counts, "train": {**counts["train"], "equal_share": 0.3}}

    def fall(label: str, *arguments: Any, **named: Any) -> None:
        monkeypatch.setitem(COUNTS, "generate", fewer if label == "generate of iteration 1" else counts)
        work(label, *arguments, **named)

    monkeypatch.setattr(stand_ins, "work", fall)
    run(make_config(generation={"temperature": temperature}, spin={"num_prompts": [None, 40]}))
    files = directory.iteration(1)
    found = json.loads(files.guards_path.read_text()) if files.guards_path.exists() else {}
    assert [entry["guard"] for entry in found.get("generate", [])] == guards
