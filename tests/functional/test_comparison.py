"""The comparison runs as its README says, at a tiny size; its steps are those of a float64 reference.

Accuracies are not asserted: they are what it is for.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pytest
import torch

from examples.comparison import player, training
from examples.comparison.arms import kind_of, run_arms
from examples.comparison.plan import SEARCH, TABLE
from examples.comparison.plot import lines_of, write_plot
from examples.comparison.table import compared, greedy, tables
from examples.comparison.world import SMALL, SMALL_OVERRIDES, make_base, world
from nemo_spin.data.datasets import REAL_ONLY, Units
from nemo_spin.objective.objective import build_objective
from tests.distributed import reference

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "comparison"
SEEDS = ("1235", "1236")  # side by side, as the whole command runs them


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """What the command printed and wrote."""
    out = tmp_path_factory.mktemp("comparison")
    command = [
        sys.executable,
        "-m",
        "examples.comparison",
        "--small",
        "--seeds",
        *SEEDS,
        "--jobs",
        "2",
        "--out",
        str(out),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((out / "table.json").read_text())
    assert written["seconds"] is None or written["seconds"] > 0
    ElementTree.parse(out / "table.svg")
    assert written["machine"]["versions"]["torch"]
    assert [entry["regime"]["name"] for entry in written["plan"]] == [regime.name for regime, _ in TABLE]
    return done.stdout, written["rows"]


def test_every_arm_is_there_and_printed(results: tuple[str, list[dict[str, Any]]]) -> None:
    printed, rows = results
    wanted = [(regime.name, arm.name) for regime, arms in TABLE for arm in arms]
    assert list(dict.fromkeys((row["regime"], row["arm"]) for row in rows)) == wanted
    assert tables(rows) in printed
    for row in rows:
        assert 0.0 <= row["greedy"] <= 1.0 and sum(row["answers"].values()) == pytest.approx(1.0)


def test_fine_tuning_takes_as_many_steps_as_self_play(results: tuple[str, list[dict[str, Any]]]) -> None:
    rows = results[1]
    steps = {(row["regime"], row["arm"]): row["steps"] for row in rows}  # the last row of an arm
    compared = 0
    for regime, arms in TABLE:
        for arm in arms:
            if arm.as_long_as is not None:
                assert steps[regime.name, arm.name] == steps[regime.name, arm.as_long_as] > 0
                compared += 1
    assert compared >= 3


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_same_seed_gives_the_same_numbers(
    results: tuple[str, list[dict[str, Any]]], tmp_path: Path, one_thread: None
) -> None:
    regime, arms = TABLE[0]
    make_base(tmp_path / "base", SMALL, SMALL_OVERRIDES)
    again = list(run_arms(world(1235, tmp_path / "base", SMALL, SMALL_OVERRIDES), regime, arms[:2]))
    assert again == results[1][: len(again)] and len(again) == 3
    other = next(row for row in results[1] if row["seed"] == 1236)
    assert other["arm"] == again[0]["arm"] and other["nll"] != again[0]["nll"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.make_model(tmp_path_factory.mktemp("model"))


def of_three_units() -> tuple[pa.Table, list[float]]:
    """Rows of units with one, three and two answers, and the weight of each pair."""
    rows = reference.make_pairs(6).to_pylist()
    for unit, (first, count) in enumerate([(0, 1), (1, 3), (4, 2)]):
        for row in rows[first : first + count]:
            row |= {"id": str(unit), "iteration": 0}
            row |= {name: rows[first][name] for name in ("prompt_ids", "real_ids")}
    table = pa.Table.from_pylist(rows)
    for name in ("prompt_ids", "real_ids", "generated_ids"):
        table = table.set_column(table.column_names.index(name), name, table[name].cast(reference.IDS))
    return table, [1 / 3, *[1 / 9] * 3, *[1 / 6] * 2]


def test_a_step_has_the_reference_s_loss_and_gradient(model_dir: Path) -> None:
    table, weights = of_three_units()
    model = reference.load(model_dir)
    opponent = torch.randn(6, 2, generator=torch.Generator().manual_seed(5)) - 30.0
    for first, count in [(1, 3), (4, 2)]:
        opponent[first : first + count, 0] = opponent[first, 0]  # one real response
    table = reference.with_opponent(table, opponent.double())
    wanted, gradient = reference.spin_step(
        model_dir, table, beta=0.3, weights=torch.tensor(weights, dtype=torch.float64)
    )
    objective = build_objective(loss="logistic", beta=0.3)
    loss = training.spin_loss(model, Units(table), [2, 0, 1], objective=objective)
    loss.backward()
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    for (
        name,
        parameter,
    ) in model.named_parameters():  # whose norms compute in float32, whatever the model's type
        scale = float(gradient[name].abs().max())
        torch.testing.assert_close(parameter.grad, gradient[name], rtol=0.0, atol=1e-5 * scale)


def test_plain_fine_tuning_has_the_reference_s_loss(model_dir: Path) -> None:
    table, model = reference.make_pairs(5), reference.load(model_dir)
    tokens = sum(map(len, table["real_ids"].to_pylist()))
    wanted = -reference.logps(model, table)[:, 0].sum().item() / tokens
    loss = training.sft_loss(model, Units(table, REAL_ONLY), [3, 1, 0, 2, 4])
    assert loss.item() == pytest.approx(wanted, rel=1e-12)


def test_scores_are_the_reference_s_log_probabilities(model_dir: Path) -> None:
    table, model = reference.make_pairs(5), reference.load(model_dir)
    found = torch.stack(player.score(model, Units(table), batch=2))
    torch.testing.assert_close(found, reference.logps(model, table).detach(), rtol=1e-12, atol=0.0)


def test_answers_are_the_model_s(model_dir: Path) -> None:
    model, end = reference.load(model_dir), 2
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12], [4]]
    settings: dict[str, Any] = {"max_tokens": 6, "end_token_id": end, "seed": (1, 0)}
    for prompt, (answer,) in zip(
        prompts, player.sample(model, prompts, temperature=0.0, **settings), strict=True
    ):
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and (ids == prompt or ids[-1] != end):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer == ids[len(prompt) :]
    settings |= {"max_tokens": 1, "temperature": 0.5}
    (drawn,) = player.sample(model, [[5, 6, 7]], num_generations=4000, **settings)
    wanted = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.5).softmax(-1)
    shares = torch.bincount(torch.tensor(drawn)[:, 0], minlength=len(wanted)) / 4000
    deviations = (wanted * (1 - wanted) / 4000).sqrt()
    assert bool(((shares - wanted).abs() < 5 * deviations + 5 / 4000).all())
    assert wanted.max() > 10 / 4000  # there is something to miss


def test_exact_matches_are_chances_of_the_one_right_answer(model_dir: Path) -> None:
    model, prompts = reference.load(model_dir), [[5, 6, 7], [8, 9], [10, 11, 12]]
    answers = player.sample(model, prompts, temperature=0.0, max_tokens=4, end_token_id=2, seed=(1,))
    reals = [answer for (answer,) in answers]
    reals[1] = [*reals[1][:-1], (reals[1][-1] + 1) % 90]  # one that is not the likeliest
    columns = {"prompt_ids": prompts, "real_ids": reals, "generated_ids": reals}
    table = pa.table({name: pa.array(values, reference.IDS) for name, values in columns.items()})
    found = player.exact_matches(model, Units(table, REAL_ONLY), (1.0, 0.5))
    logps = reference.logps(model, table)[:, 0].detach()
    assert found["greedy"] == pytest.approx(2 / 3)
    assert found["nll"] == pytest.approx(-logps.mean().item(), rel=1e-9)
    assert found["sampled"][1.0] == pytest.approx(logps.exp().mean().item(), rel=1e-9)
    assert found["sampled"][0.5] > found["sampled"][1.0]


@pytest.mark.parametrize(
    ("text", "kind"),
    [(" a b c", "right"), ("b a c", "order"), ("a b d", "letters"), ("a b", "form"), ("a b cc", "form")],
)
def test_kinds_of_answers(text: str, kind: str) -> None:
    assert kind_of("a b c", text) == kind


@pytest.mark.parametrize(("name", "plan"), [("table", TABLE), ("search", SEARCH)])
def test_the_readme_shows_the_results_that_lie_beside_it(name: str, plan: Any) -> None:
    rows = json.loads((EXAMPLE / "results" / f"{name}.json").read_text())["rows"]
    wanted = {(regime.name, arm.name) for regime, arms in plan for arm in arms}
    assert wanted == {(row["regime"], row["arm"]) for row in rows}
    readme = (EXAMPLE / "README.md").read_text()
    for line in tables(rows, whole=name == "table").splitlines():
        assert line in readme, line


def test_the_plot_is_of_the_results_that_lie_beside_it(tmp_path: Path) -> None:
    rows = json.loads((EXAMPLE / "results" / "table.json").read_text())["rows"]
    write_plot(tmp_path / "table.svg", rows)
    assert (tmp_path / "table.svg").read_text() == (EXAMPLE / "results" / "table.svg").read_text()
    lines = lines_of([row for row in rows if row["regime"] == "quickstart"], greedy)
    assert [round(point.steps) for point in lines["fine-tuning"]] == [0, 32, 51, 105]
    of_seeds = [row["greedy"] for row in rows if row["arm"] == "theta_0" and row["regime"] == "quickstart"]
    start = lines["self-play"][0]
    assert (start.mean, start.deviation) == pytest.approx(
        (statistics.mean(of_seeds), statistics.stdev(of_seeds))
    )


def test_a_run_says_which_rows_are_those_of_an_earlier_one() -> None:
    rows = json.loads((EXAMPLE / "results" / "table.json").read_text())["rows"]
    assert compared(rows, rows).startswith(f"{len(rows)} of {len(rows)} rows")
    moved = [{**rows[0], "greedy": rows[0]["greedy"] - 0.25}, {**rows[1], "seed": 9}, *rows[2:5]]
    first, line = compared(moved, rows).splitlines()
    assert first.startswith("3 of 5 rows")
    assert line == "  seed 1235: quickstart: theta_0: sampled +0, greedy -0.25"


def test_the_main_readme_s_rows_are_those_results() -> None:
    rows = json.loads((EXAMPLE / "results" / "table.json").read_text())["rows"]
    as_long = "fine-tuning for as many steps as"
    four = "3 iterations, 4 answers per prompt"
    arms = {  # in the README's order: what it calls a row, and which it is
        "quickstart": [
            ("theta_0", "theta_0", None),
            ("self-play, three iterations", "self-play", 3),
            ("self-play with 4 answers per prompt", four, 3),
            ("fine-tuning", f"{as_long} self-play", None),
            ("fine-tuning", f"{as_long} {four}", None),
        ],
        "a quarter wrong": [
            ("**a quarter of the demonstrations wrong:** theta_0", "theta_0", None),
            ("self-play, three iterations", "self-play", 3),
            ("self-play with 4 answers per prompt", four, 3),
            ("fine-tuning", f"{as_long} {four}", None),
            ("fine-tuning at ten times the learning rate", f"{as_long} {four}, lr 1e-3", None),
        ],
    }
    wanted = []
    for regime, label, arm, last in ((regime, *row) for regime, table in arms.items() for row in table):
        same = [row for row in rows if (row["regime"], row["arm"], row["iteration"]) == (regime, arm, last)]
        assert len(same) == 3
        steps = sum(row["steps"] for row in same) / 3
        values = [[row["sampled"]["1.0"], row["sampled"]["0.5"], row["greedy"]] for row in same]
        means = [f"{sum(column) / 3:.3f}" for column in zip(*values, strict=True)]
        wanted.append([label, f"{steps:.0f}", *means])
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("### Self-play beside fine-tuning")[2].partition("## How it works")[0]
    lines = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")][2:]
    assert [[cell.strip() for cell in line] for line in lines] == wanted
