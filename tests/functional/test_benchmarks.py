"""The benchmarks' entry point at small sizes: what is compared is the same, and memory is what is claimed.

Times are not asserted: they belong to the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.benchmarks import iteration
from examples.benchmarks.answering import write_answering_llama, write_word_chats, write_word_tokenizer
from examples.benchmarks.batched_generate import CACHES, answers_of
from examples.benchmarks.chat_lengths import PROMPT, RESPONSE, chat_pairs, lengths
from examples.benchmarks.epoch import OURS, check_same
from examples.benchmarks.measure import Run, ratios, spread, summary
from examples.benchmarks.memory import number_of_weights
from examples.benchmarks.training import sorted_within_batches

ROOT = Path(__file__).parents[2]


def benchmark(name: str, json_path: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """What was printed, and what was written."""
    command = [sys.executable, "-m", "examples.benchmarks", name, "--json", str(json_path), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(json_path.read_text())


def test_the_head_needs_less_than_an_eighth_of_the_plain_ones_memory(tmp_path: Path) -> None:
    sizes = ["--vocabulary", "32768", "--tokens", "4096", "--hidden", "32", "--precision", "32"]
    shown, written = benchmark("head", tmp_path / "head.json", *sizes, "--repeats", "1")
    assert "without logits" in shown and "peak MiB" in shown
    assert written["machine"]["versions"]["torch"] and written["settings"]["tokens"] == 4096
    result = written["results"]["32"]
    logits_mib = 32768 * 4096 * 4 / 2**20
    # log_softmax's result, the gradient of it and that of the logits
    assert result["plain"]["above_mib"]["median"] == pytest.approx(3 * logits_mib, rel=0.1)
    assert result["ratio"]["above_mib"]["median"] < 1 / 8
    assert result["ratio"]["whole_mib"]["median"] < 1 / 8


def test_a_peer_that_is_compared_with_does_the_same(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the peer: pip install .[bench]")
    sizes = ["--pairs", "16", "--global-batch-size", "8", "--hidden", "64", "--layers", "2", "--scale", "0.1"]
    sizes += ["--vocabulary", "512", "--peer-micro-batch-sizes", "4", "--repeats", "1", "--lengths", "chat"]
    shown, written = benchmark("training", tmp_path / "training.json", *sizes)
    results = written["results"]["chat"]
    last, tried = results.pop("last_loss"), results.pop("tried_micro_batch_sizes")
    assert len(results) == 3 and last.keys() == results.keys() and tried.keys() == {"4"}
    assert all(name in shown for name in results)
    assert np.ptp(list(last.values())) < 1e-3
    assert last[OURS] != pytest.approx(np.log(2), abs=1e-5), "a step was taken"


def test_nothing_is_compared_where_losses_differ() -> None:
    runs = {OURS: [{"loss_0": 0.5, "seconds": 1.0}], "TRL": [{"loss_0": 0.5009, "seconds": 9.0}]}
    check_same(runs)
    for other in ({"loss_0": 0.502}, {"loss_0": float("nan")}, {"loss_0": 0.5, "loss_1": 0.4}):
        with pytest.raises(SystemExit, match="nothing to compare"):
            check_same(runs | {"TRL": [other]})


def test_weights_gradients_and_moments_are_told_from_what_a_step_needs(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the peer: pip install .[bench]")
    sizes = ["--pairs", "4", "--hidden", "64", "--layers", "2", "--vocabulary", "512", "--scale", "0.1"]
    shown, written = benchmark("memory", tmp_path / "memory.json", *sizes, "--repeats", "1")
    results = written["results"]
    weights = results.pop("weights")
    assert len(results) == 5 and all(name in shown for name in results)
    for found in results.values():
        above, working = (found[key]["median"] for key in ("above_mib", "working_mib"))
        assert above - working == pytest.approx(16 * weights / 2**20)
        assert found["whole_mib"]["median"] > above


def test_weights_are_counted_in_the_file_of_them(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert number_of_weights(tmp_path) == 22


def test_work_grows_by_the_factors_it_is_said_to(tmp_path: Path) -> None:
    sizes = ["--factors", "1", "2", "--pairs", "2", "--length", "16", "--layers", "1", "--hidden", "32"]
    sizes += ["--ranks", "1", "--rank-pairs", "4", "--scale", "0.1", "--repeats", "1"]
    shown, written = benchmark("scaling", tmp_path / "scaling.json", *sizes)
    results = written["results"]
    ranks = results.pop("ranks")
    assert ranks["1"]["all_ranks"]["median"] == 1.0
    assert results.keys() == {"pairs", "length", "layers"} and "layers x2" in shown
    for axis in ("pairs", "length"):
        assert results[axis]["2"]["work"] == pytest.approx(2.0)
    assert 1.0 < results["layers"]["2"]["work"] < 2.0, "the output layer stays one"
    for steps in results.values():
        for found in steps.values():  # attention was found, and is less than everything
            assert found["without_attention"]["median"] > 0
        assert steps["1"]["without_attention"]["median"] == 1.0


@pytest.mark.slow
def test_ranks_that_share_a_batch_do_the_work_of_one(tmp_path: Path) -> None:
    sizes = ["--factors", "1", "--pairs", "2", "--length", "16", "--hidden", "32", "--scale", "0.1"]
    sizes += ["--ranks", "1", "2", "--rank-pairs", "8", "--repeats", "1"]
    _, written = benchmark("scaling", tmp_path / "scaling.json", *sizes)
    found = written["results"]["ranks"]["2"]
    assert found["busiest"]["median"] >= found["all_ranks"]["median"] > 0


@pytest.mark.slow
def test_time_beside_computing_adds_up(tmp_path: Path) -> None:
    sizes = ["--pairs", "12", "--heldout", "2", "--global-batch-size", "4", "--hidden", "32", "--layers", "2"]
    sizes += ["--vocabulary", "256", "--scale", "0.1", "--repeats", "1"]
    shown, written = benchmark("overhead", tmp_path / "overhead.json", *sizes)
    seconds = {name: value["median"] for name, value in written["results"]["seconds"].items()}
    shares = {name: value["median"] for name, value in written["results"]["shares"].items()}
    assert "train checkpoint" in shown and min(seconds.values()) >= 0
    computing = ("score_forward", "train_forward_backward", "train_optimizer")
    assert sum(shares[name] for name in (*computing, "beside")) == pytest.approx(1.0)
    assert seconds["train_checkpoint"] > 0 and seconds["train_evaluation"] > 0


@pytest.mark.slow
def test_preparing_gives_the_ids_that_datasets_gives(tmp_path: Path) -> None:
    sizes = ["--rows", "300", "--scale", "0.1", "--vocabulary", "400", "--threads", "1", "--repeats", "1"]
    shown, written = benchmark("preparation", tmp_path / "preparation.json", *sizes)
    assert all(name in shown for name in written["results"])
    assert len(written["results"]) == 4


@pytest.mark.slow
@pytest.mark.vllm
def test_generation_answers_as_transformers_does(tmp_path: Path) -> None:
    sizes = ["--prompts", "24", "--tokens", "16", "--mean-tokens", "6", "--hidden", "64", "--layers", "2"]
    sizes += ["--vocabulary", "512", "--peer-batch-sizes", "4", "8", "--repeats", "1", "--scale", "0.1"]
    shown, written = benchmark("generation", tmp_path / "generation.json", *sizes)
    results = written["results"]
    assert "starting included" in shown and results["batch_size"] in (4, 8) and results["cache"] in CACHES
    assert len(results["searched_tokens_per_second"]) == 2 * len(CACHES)
    for name in ("nemo_spin", "transformers"):
        assert 1 < results[name]["mean_tokens"]["median"] < 16


def iteration_runs(**changed: float) -> dict[str, list[Run]]:
    """Of three ways, the third with `changed`."""
    runs = {}
    for place, name in enumerate(("nemo_spin", *iteration._PEERS)):
        times = {"generate_s": 1.0, "train_s": 2.0}
        sizes = np.array([3, 4, 5 + place])
        run = iteration._result((4.0 + place, 6.0), times, sizes, (10, 20), first_loss=np.log(2))
        runs[name] = [run | {"stage_train": 2.0, "tokens_lost_as_text": 0.0}]
    runs[name][0].update(changed)
    return runs


def test_an_iteration_is_shown_beside_its_peers(capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(prompts=3, epochs=1, hidden=8, layers=1, repeats=1)
    runs = iteration_runs()
    iteration._check_same(runs, prompts=3)
    results = iteration._report(runs, options)
    assert [results[name]["seconds_over_ours"]["median"] for name in iteration._PEERS] == [1.25, 1.5]
    assert results["nemo_spin"]["other_s"]["median"] == 1.0 and results["stages"]["train"]["median"] == 2.0
    assert "1.50" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt_tokens": 11},
        {"real_tokens": 19},
        {"first_loss": 0.7},
        {"mean_tokens": 20.0},
        {"tokens_lost_as_text": 1.0},
    ],
)
def test_an_iteration_that_did_something_else_is_not_compared(changed: dict[str, float]) -> None:
    with pytest.raises(SystemExit):
        iteration._check_same(iteration_runs(**changed), prompts=3)


@pytest.mark.slow
@pytest.mark.vllm
def test_an_iteration_does_what_the_official_steps_do(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the peer: pip install .[bench]")
    sizes = ["--prompts", "16", "--tokens", "16", "--mean-tokens", "6", "--hidden", "64", "--layers", "2"]
    sizes += ["--vocabulary", "512", "--global-batch-size", "8", "--repeats", "1", "--scale", "0.1"]
    shown, written = benchmark("iteration", tmp_path / "iteration.json", *sizes)
    assert {"prepare", "generate", "score", "train", "export"} <= written["results"].pop("stages").keys()
    assert len(written["results"]) == 3 and all(name in shown for name in written["results"])
    for result in written["results"].values():
        assert result["first_loss"]["median"] == pytest.approx(np.log(2), abs=1e-5)


def test_batched_answers_are_those_to_each_prompt_alone(tmp_path: Path) -> None:
    model = _answering(tmp_path, mean_tokens=0)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(4, 300, size).tolist() for size in (3, 17, 9, 1, 12)]
    greedy = {"max_tokens": 12, "temperature": 0.0}
    alone = answers_of(model, prompts, batch_size=1, **greedy)
    assert len({str(answer) for answer in alone}) > 1
    model.config.eos_token_id = model.generation_config.eos_token_id = alone[0][4]
    alone = answers_of(model, prompts, batch_size=1, **greedy)
    assert len(alone[0]) <= 5 and alone[0][-1] == model.config.eos_token_id
    for cache in CACHES:
        assert answers_of(model, prompts, batch_size=3, cache=cache, **greedy) == alone


def test_answers_end_as_often_as_they_should(tmp_path: Path) -> None:
    import torch

    model = _answering(tmp_path, mean_tokens=8)
    torch.manual_seed(0)
    answers = answers_of(model, [[1, 9, 3, 2]] * 400, batch_size=400, max_tokens=100, temperature=1.0)
    sizes = np.array([len(answer) for answer in answers])
    assert abs(sizes.mean() - 8) < 4 * sizes.std() / np.sqrt(len(sizes))
    assert np.std(sizes) == pytest.approx(np.sqrt(8 * 7), rel=0.2), "as of a geometric distribution"


def test_a_word_is_a_token_there_and_back(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_word_tokenizer(tmp_path / "tokenizer", vocabulary=300))
    chats = write_word_chats(tmp_path / "chats.jsonl", 3, vocabulary=300, seed=0, scale=0.1)
    for line in chats.read_text().splitlines():
        messages = json.loads(line)["messages"]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        words = [message["content"].split() for message in messages]
        assert len(ids) == sum(map(len, words)) + 4 and 0 not in ids
        answer = ids[len(words[0]) + 3 :]
        assert tokenizer.decode(answer, skip_special_tokens=True) == messages[1]["content"]


def _answering(directory: Path, mean_tokens: float) -> Any:
    from transformers import AutoModelForCausalLM

    sizes = {"vocabulary": 300, "hidden": 32, "layers": 2}
    write_answering_llama(directory / "model", **sizes, mean_tokens=mean_tokens)
    return AutoModelForCausalLM.from_pretrained(directory / "model").eval()


def test_batches_keep_their_pairs_when_they_are_sorted() -> None:
    pairs = chat_pairs(20, vocabulary=50)
    found = sorted_within_batches(pairs, 8)
    ids = [str(row) for row in pairs["real_ids"].to_pylist()]
    kept = [str(row) for row in found["real_ids"].to_pylist()]
    for start in (0, 8, 16):
        assert sorted(ids[start : start + 8]) == sorted(kept[start : start + 8])
    padded = [
        len(row["prompt_ids"]) + max(len(row["real_ids"]), len(row["generated_ids"]))
        for row in found.to_pylist()
    ]
    assert padded[:8] == sorted(padded[:8]) and padded[16:] == sorted(padded[16:])


def test_packing_computes_the_same_with_fewer_slots(tmp_path: Path) -> None:
    sizes = ["--scale", "0.1", "--hidden", "32", "--pairs", "12", "--batches", "2", "--repeats", "1"]
    shown, written = benchmark("packing", tmp_path / "packing.json", *sizes)
    computed = written["results"]["computed"]
    assert all(name in shown for name in computed)
    shares = [computed[name]["useful_share"] for name in ("shared_prompt", "pairs", "none")]
    shares.append(computed["padded to the longest"]["useful_share"])
    assert shares[0] == 1.0 and shares == sorted(shares, reverse=True)
    counted = written["results"]["counted"]
    assert all(one["useful_share"] == 1.0 for one in counted if one["multiple"] == 1)
    assert all(one["busy_share"] <= one["useful_share"] for one in counted)


def test_at_least_97_of_100_slots_are_useful_on_chat_like_lengths() -> None:
    """Also where rows are padded to multiples of 16 and ranks wait for the slowest of eight."""
    from examples.benchmarks.packing import _count
    from nemo_spin.data.datasets import Units

    options = argparse.Namespace(pairs=64, micro_batch_size=4)
    units = Units(chat_pairs(8 * 64, vocabulary=100, seed=1))
    found = _count(options, units, budget=8192, ranks=8, multiple=16)
    assert found["useful_share"] > 0.99 and found["busy_share"] > 0.97


@pytest.mark.parametrize("shape", [PROMPT, RESPONSE], ids=["prompt", "response"])
def test_lengths_are_log_normal_within_bounds_and_seeded(shape: tuple[float, float, int, int]) -> None:
    median, _, least, most = shape
    found = lengths(np.random.default_rng(0), 20_000, shape)
    assert least <= found.min() and found.max() <= most
    assert np.median(found) == pytest.approx(median, rel=0.1)
    assert np.mean(found) > np.median(found)
    assert np.array_equal(found, lengths(np.random.default_rng(0), 20_000, shape))


def test_ratios_are_formed_within_a_turn() -> None:
    """A machine that becomes twice as slow changes times, not ratios."""
    ours, theirs = [{"seconds": 1.0}, {"seconds": 2.0}], [{"seconds": 2.0}, {"seconds": 4.0}]
    assert ratios(ours, theirs, "seconds") == [0.5, 0.5]
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.0]}
    assert spread([3.0, 1.0, 2.0], 1) == "2.0 (1.0-3.0)" and spread([1234.0], 0) == "1,234"
