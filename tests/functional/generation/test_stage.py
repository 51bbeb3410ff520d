"""The generate stage with the real vLLM: what its answers are, and that they stay the same."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest

from nemo_spin.data.files import read_manifest, sha256_file, verify_manifest
from nemo_spin.errors import ConfigError
from nemo_spin.generation.job import NothingToDo, SamplerJob
from nemo_spin.generation.running import wait
from tests import prepared
from tests.functional.generation.harness import MAX_TOKENS, STOP_TOKEN_IDS, Stage, by_key, configuration

STOPS = {prepared.END_TOKEN, *STOP_TOKEN_IDS}


def test_every_prompt_of_every_split_is_answered_in_order(reference: Stage) -> None:
    for split, rows in (("train", prepared.rows(40, seed=1)), ("heldout", prepared.rows(12, seed=2))):
        table = reference.table(split)
        assert table["id"].to_pylist() == [row["id"] for row in rows for _ in range(2)]
        assert table["sample"].to_pylist() == [0, 1] * len(rows)
        assert table["prompt_ids"].to_pylist() == [row["prompt_ids"] for row in rows for _ in range(2)]
        assert table["real_ids"].to_pylist() == [row["real_ids"] for row in rows for _ in range(2)]
        assert set(table["iteration"].to_pylist()) == {1}
        assert set(table["opponent_sha256"].to_pylist()) == {"a" * 64}


def test_an_answer_ends_with_its_only_stop_token_or_at_the_limit(reference: Stage) -> None:
    reasons = []
    for row in reference.table().to_pylist():
        ids = row["generated_ids"]
        reasons.append(row["finish_reason"])
        if row["finish_reason"] == "stop":
            assert ids[-1] in STOPS
            assert not STOPS & set(ids[:-1])
            assert len(ids) <= MAX_TOKENS
        else:
            assert row["finish_reason"] == "length"
            assert not STOPS & set(ids)
            assert len(ids) == MAX_TOKENS
        assert row["num_sampler_tokens"] == len(ids)
    assert {"stop", "length"} == set(reasons), "the test needs both kinds"


def test_samples_of_a_prompt_differ(reference: Stage) -> None:
    rows = by_key(reference.table())
    same = sum(
        rows[(f"row-1-{n}", 0)]["generated_ids"] == rows[(f"row-1-{n}", 1)]["generated_ids"]
        for n in range(40)
    )
    assert same <= 2  # both may stop at once


def test_log_probabilities_are_those_of_the_model_alone(reference: Stage, tiny_model: Path) -> None:
    """An independent float64 computation; temperature and stops have no part in it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    for row in reference.table().to_pylist()[:40]:
        prompt, answer = row["prompt_ids"], row["generated_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, -1)[torch.arange(len(answer)), torch.tensor(answer)].sum()
        assert row["sampler_logps"] == pytest.approx(expected.item(), abs=1e-3)


def test_the_manifest_counts_what_the_shards_hold(reference: Stage) -> None:
    manifest = read_manifest(reference.out_dir)
    assert manifest is not None
    verify_manifest(reference.out_dir, manifest)
    table = reference.table().to_pylist()
    lengths = [len(row["generated_ids"]) for row in table]
    counts = manifest.counts["train"]
    assert (counts["rows"], counts["prompts"], counts["tokens"]) == (80, 40, sum(lengths))
    assert counts["mean_length"] == pytest.approx(sum(lengths) / 80)
    assert counts["cut_share"] == pytest.approx(sum(row["finish_reason"] == "length" for row in table) / 80)
    assert counts["empty_share"] == pytest.approx(
        sum(row["finish_reason"] == "stop" and len(row["generated_ids"]) == 1 for row in table) / 80
    )
    assert manifest.counts["heldout"]["rows"] == 24
    assert len(manifest.files) == 5 + 2
    assert manifest.inputs == reference.inputs


def test_progress_reaches_the_end_and_tells_the_speed(reference: Stage) -> None:
    events = [json.loads(line) for line in reference.progress_path.read_text().splitlines()]
    updates = [event for event in events if event["event"] == "update"]
    assert updates[0]["done"] == 0
    assert updates[-1]["done"] == updates[-1]["total"] == 104
    assert updates[-1]["values"]["tokens_per_s"] > 0


def test_the_same_rows_get_the_same_answers_however_they_are_cut_and_ordered(
    reference: Stage, tiny_model: Path, tmp_path: Path
) -> None:
    reversed_dir = prepared.write(tmp_path / "data", train=prepared.rows(40, seed=1)[::-1])
    other = Stage(tiny_model, reversed_dir, tmp_path, config=configuration(shard_rows=17, max_num_seqs=5))
    other.run()
    ours, theirs = by_key(reference.table()), by_key(other.table())
    assert ours.keys() == theirs.keys()
    for key, row in ours.items():
        assert row["generated_ids"] == theirs[key]["generated_ids"], key
        assert row["sampler_logps"] == pytest.approx(theirs[key]["sampler_logps"], abs=1e-4)


def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(
    reference: Stage, tiny_model: Path, prepared_dir: Path, tmp_path: Path
) -> None:
    stage = Stage(tiny_model, prepared_dir, tmp_path)
    job = stage.start()
    assert isinstance(job, SamplerJob)
    while len(list(stage.out_dir.glob("train-shard-*.parquet"))) < 2:
        assert job.poll() is None, "it was too fast to be killed"
        time.sleep(0.001)
    os.killpg(job.pid, signal.SIGKILL)
    with pytest.raises(Exception, match="SIGKILL"):
        wait(job)
    kept = {path.name: path.stat().st_mtime_ns for path in stage.out_dir.glob("*.parquet")}
    assert 2 <= len(kept) < 7
    assert read_manifest(stage.out_dir) is None

    damaged = stage.out_dir / "train-shard-00001-of-00005.parquet"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 3] ^= 1
    damaged.write_bytes(content)
    manifest = stage.run()

    assert manifest.files == read_manifest(reference.out_dir).files  # type: ignore[union-attr]
    first = stage.out_dir / "train-shard-00000-of-00005.parquet"
    assert first.stat().st_mtime_ns == kept[first.name], "a sound shard is kept"
    assert sha256_file(damaged) == sha256_file(reference.out_dir / damaged.name)
    assert "made again" in stage.progress_path.read_text()


def test_done_work_starts_no_engine(reference: Stage) -> None:
    assert isinstance(reference.start(), NothingToDo)


def test_other_inputs_are_refused_with_the_difference(reference: Stage, tmp_path: Path) -> None:
    other = Stage(
        reference.model_dir,
        reference.prepared,
        reference.directory,
        config=configuration(temperature=0.5),
        inputs={"data": "e" * 64},
    )
    with pytest.raises(ConfigError) as caught:
        other.start()
    assert 'data: was "dddd' in str(caught.value)
    assert "passes.train.temperature: was 1.0, is 0.5" in str(caught.value)


@pytest.fixture
def without_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All programs but compilers, and nothing that was compiled before."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for directory in ("/usr/bin", "/bin"):
        for path in Path(directory).iterdir():
            is_compiler = any(name in path.name for name in ("gcc", "g++", "clang", "c++"))
            if not is_compiler and path.name not in ("cc", "c89", "c99", "ld", "as"):
                (programs / path.name).unlink(missing_ok=True)
                (programs / path.name).symlink_to(path)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm"))


@pytest.mark.usefixtures("without_compiler")
def test_the_screen_stays_clean_and_the_log_tells_all(
    tiny_model: Path, prepared_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a machine that has no compiler, as users' often have none."""
    stage = Stage(tiny_model, prepared_dir, tmp_path, config=configuration(temperature=0, num_generations=1))
    stage.run()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert "vllm" in stage.log_path.read_text().lower()
    _assert_greedy(stage, tiny_model)


def _assert_greedy(stage: Stage, model_dir: Path) -> None:
    """Temperature 0 takes the same tokens as `transformers` does."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for row in stage.table().to_pylist():
        with torch.no_grad():
            output = model.generate(
                torch.tensor([row["prompt_ids"]]),
                do_sample=False,
                max_new_tokens=MAX_TOKENS,
                eos_token_id=sorted(STOPS),
                pad_token_id=0,
            )
        assert row["generated_ids"] == output[0, len(row["prompt_ids"]) :].tolist()
        assert math.isfinite(row["sampler_logps"])
