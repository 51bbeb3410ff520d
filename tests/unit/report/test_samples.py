from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_spin.report.notes import Notes
from nemo_spin.report.pair_values import PairValues, pair_values
from nemo_spin.report.samples import MAX_CHARACTERS, Samples, clipped, collect_samples
from nemo_spin.report.sources import RunSource
from tests.unit.report.runs import Shape, Writer, write_run


def collect(run: RunSource, *, limit: int = 1000, notes: Notes | None = None) -> Samples:
    following = [*run.parts[1:], None]
    values: list[PairValues] = [pair_values(*pair) for pair in zip(run.parts, following, strict=True)]
    notes = notes or Notes()
    samples = collect_samples(run, values, limit=limit, notes=notes)
    assert samples.answers or limit == 0 or notes.lines
    return samples


def test_texts_are_what_the_ids_say(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", Shape(num_generations=2))
    samples = collect(writer.write())
    place = samples.ids.index("train-000007")
    assert samples.prompts[place] == writer.prepared["train"][7]["prompt_text"]
    assert samples.reals[place] == writer.prepared["train"][7]["real_text"]
    pairs = [pair for pair in writer.pairs[1]["train"] if pair["id"] == "train-000007"]
    drawn = [answer for answer in samples.answers[place] if answer["m"] == 1]
    assert len(drawn) == 2
    for pair, answer in zip(pairs, drawn, strict=True):
        body = pair["generated_ids"][:-1] if pair["finish_reason"] == "stop" else pair["generated_ids"]
        assert answer["t"] == writer.tokenizer.decode(body)
        assert answer["n"] == len(pair["generated_ids"])
        assert answer.get("c") == (1 if pair["finish_reason"] == "length" else None)
        assert answer.get("e") == (1 if pair["generated_ids"] == pair["real_ids"] else None)


def test_margins_stand_beside_the_answers_they_belong_to(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Shape(num_generations=2))
    samples = collect(run)
    table = pair_values(run.parts[0], run.parts[1]).margins
    assert table is not None
    margins = {(row["id"], row["sample"]): row["margin"] for row in table.to_pylist()}
    place = samples.ids.index("train-000003")
    first = [answer["g"] for answer in samples.answers[place] if answer["m"] == 0]
    assert first == pytest.approx([margins["train-000003", 0], margins["train-000003", 1]], rel=1e-6)
    assert all("g" not in answer for answer in samples.answers[place] if answer["m"] == 1)


def test_held_out_prompts_have_scored_answers_of_every_model(tmp_path: Path) -> None:
    samples = collect(write_run(tmp_path / "run"))
    place = samples.ids.index("heldout-000000")
    kinds = {(answer["m"], answer["k"]) for answer in samples.answers[place] if answer["k"] != "drawn"}
    assert kinds == {(model, kind) for model in (0, 1, 2) for kind in ("sampled", "greedy")}
    assert all("s" in answer for answer in samples.answers[place] if answer["k"] != "drawn")


def test_the_same_ids_in_both_splits_are_different_prompts(tmp_path: Path) -> None:
    apart = collect(write_run(tmp_path / "apart"), limit=20)
    run = write_run(tmp_path / "same", Shape(same_ids=True))
    same = collect(run, limit=20)
    assert len(set(same.ids)) < len(same.ids)
    assert (same.splits, same.prompts, same.reals) == (apart.splits, apart.prompts, apart.reals)
    texts = [
        [[(answer["m"], answer["k"], answer["t"]) for answer in of] for of in s.answers]
        for s in (same, apart)
    ]
    assert texts[0] == texts[1]
    values = pair_values(run.parts[0], run.parts[1])
    assert values.margins is not None
    margins = {row["id"]: row["margin"] for row in values.margins.to_pylist()}
    changes = {
        (split, row["id"]): row["change"]
        for split, table in values.real_changes.items()
        for row in table.to_pylist()
    }
    for split, row_id, answers in zip(same.splits, same.ids, same.answers, strict=True):
        (drawn,) = [answer for answer in answers if (answer["m"], answer["k"]) == (0, "drawn")]
        assert drawn.get("g") == (pytest.approx(margins[row_id], rel=1e-6) if split == "train" else None)
        assert drawn["d"] == pytest.approx(changes[split, row_id], rel=1e-6)


@pytest.mark.parametrize(
    ("limit", "train", "heldout"), [(1000, 40, 12), (20, 15, 5), (44, 33, 11), (50, 38, 12), (0, 0, 0)]
)
def test_a_quarter_is_held_out_and_no_place_is_wasted(
    tmp_path: Path, limit: int, train: int, heldout: int
) -> None:
    samples = collect(write_run(tmp_path / "run"), limit=limit)
    assert (samples.splits.count("train"), samples.splits.count("heldout")) == (train, heldout)
    assert samples.available == {"train": 40, "heldout": 12}
    if train > 1:
        assert (samples.ids[0], samples.ids[train - 1]) == ("train-000000", "train-000039")


def test_long_texts_are_cut_and_say_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Shape(special=["x" * (MAX_CHARACTERS + 1234)]))
    prompt = collect(run).prompts[0]
    assert prompt.endswith("(+1,234 characters)")
    assert len(prompt) < MAX_CHARACTERS + 50
    assert clipped("y" * MAX_CHARACTERS) == "y" * MAX_CHARACTERS


def test_without_a_tokenizer_the_rest_is_shown_and_a_note_says_why(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", Shape())
    run = writer.write()
    for path in writer.theta_0.glob("*token*"):
        path.unlink()
    notes = Notes()
    samples = collect(run, notes=notes)
    assert len(samples.ids) == 52
    assert {answer["k"] for answers in samples.answers for answer in answers} == {"sampled", "greedy"}
    assert "texts of the answers" in notes.lines[0]


def test_a_damaged_shard_is_a_note(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    next(run.parts[1].paths.evaluation.glob("evaluation.parquet")).write_bytes(b"")
    notes = Notes()
    samples = collect(run, notes=notes)
    assert notes.lines[0].startswith("held-out answers after iteration 1: not in this report")
    assert any(answer["m"] == 1 for answers in samples.answers for answer in answers)


def test_nothing_prepared_yet(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shutil.rmtree(run.data_dir)
    assert collect(run, limit=0).ids == []
