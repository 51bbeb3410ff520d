"""Run directories as the stages leave them, made in a moment, with numbers that look like a run's.

The columns, manifests and metrics lines are those of the package; texts and values are invented.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from nemo_spin.data.columns import GENERATED, PREPARED, SCORED
from nemo_spin.data.files import write_json, write_manifest
from nemo_spin.evaluate.heldout import ANSWERS
from nemo_spin.generation.counts import count_answers
from nemo_spin.report import published
from nemo_spin.report.sources import PartSource, RunSource, StageTime
from nemo_spin.selfplay.run_directory import RunDirectory
from tests.models import write_tokenizer

END = 3
WORDS = ("copper", "lantern", "river", "seven", "quiet", "harbour", "paper", "violet", "engine", "meadow")
BETA = 0.1

GUARDS = {
    "generate": [],
    "train": [
        {"guard": "real_fall", "level": "warn", "value": 0.02, "threshold": 0.01, "step": 7}
        | {"message": "demonstrations became <b>less</b> likely"}
    ],
}

Texts = Callable[[random.Random], str]


def sentence(chance: random.Random) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(chance.randint(3, 14)))


@dataclass
class Shape:
    """What kind of run to make.

    Attributes:
        prompts, heldout: Rows of the splits.
        iterations: How many.
        steps: Optimizer steps of each.
        num_generations: Per prompt.
        history: 1: iteration t scores the pairs of iteration t-1 again.
        scorer: Whether held-out answers have scores.
        prompt, answer: Make the texts.
        special: Prompts that stand first.
        same_ids: Whether both splits count their rows by the same ids, as a user's `data.id_column` may.
    """

    prompts: int = 40
    heldout: int = 12
    iterations: int = 2
    steps: int = 20
    num_generations: int = 1
    history: int = 1
    scorer: bool = True
    prompt: Texts = sentence
    answer: Texts = sentence
    special: Sequence[str] = ()
    same_ids: bool = False
    seed: int = 0
    drift: float = 0.02


def write_run(path: Path, shape: Shape | None = None) -> RunSource:
    """Writes the run and returns it as a report takes it."""
    return Writer(path, shape or Shape()).write()


class Writer:
    """Writes one run directory."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self.run = RunDirectory(path)
        self.shape = shape
        self.chance = random.Random(shape.seed)
        self.theta_0 = path.parent / f"{path.name}-theta_0"
        self.tokenizer = write_tokenizer(self.theta_0)
        write_json(self.theta_0 / "config.json", {"architectures": ["LlamaForCausalLM"], "hidden_size": 64})
        self.prepared: dict[str, list[dict[str, Any]]] = {}
        self.pairs: dict[int, dict[str, list[dict[str, Any]]]] = {}

    def write(self) -> RunSource:
        self.run.path.mkdir(parents=True, exist_ok=True)
        settings = {
            "name": "synthetic",
            "trainer": {"num_nodes": 2, "devices": 8},
            "spin": {"beta": BETA, "lr": [1e-6, 5e-7], "history": self.shape.history},
        }
        self.run.config_path.write_text(
            yaml.safe_dump({**settings, "seed": self.shape.seed}), encoding="utf-8"
        )
        self.prepare()
        self.evaluation(
            0, self.run.iteration(0).opponent_evaluation, self.run.iteration(0).opponent_evaluation_path
        )
        parts = []
        for iteration in range(self.shape.iterations):
            files = self.run.iteration(iteration)
            files.path.mkdir(exist_ok=True)
            files.opponent.symlink_to(self.theta_0)
            self.generated(iteration)
            self.scored(iteration)
            self.trained(iteration)
            self.evaluation(iteration + 1, files.evaluation, files.evaluation_path)
            if iteration == 1:
                write_json(files.guards_path, GUARDS)
            times = {
                "generate": 310.0,
                "score": 95.0,
                "train": 780.0 + 60 * iteration,
                "export": 21.0,
                "evaluate": 64.0,
            }
            attempts = {"train": 2} if iteration == 1 else {}
            parts.append(
                PartSource(iteration, files, {k: StageTime(v, attempts.get(k, 1)) for k, v in times.items()})
            )
        return RunSource(
            path=self.run.path,
            config_path=self.run.config_path,
            data_dir=self.run.data_dir,
            parts=tuple(parts),
            status="done",
            host="node-7",
            times={"prepare": StageTime(12.5), "evaluate": StageTime(66.0)},
        )

    def ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [[*ids, END] for ids in encoded]

    def prepare(self) -> None:
        directory, counts = self.run.data_dir, {}
        directory.mkdir()
        for split, number in (("train", self.shape.prompts), ("heldout", self.shape.heldout)):
            prompts = [self.shape.prompt(self.chance) for _ in range(number)]
            if split == "train":
                prompts[: len(self.shape.special)] = self.shape.special
            reals = [self.shape.answer(self.chance) for _ in range(number)]
            self.prepared[split] = [
                {
                    "id": f"{'row' if self.shape.same_ids else split}-{i:06d}",
                    "prompt_ids": p[:-1],
                    "real_ids": r,
                    "prompt_text": pt,
                    "real_text": rt,
                }
                for i, (p, r, pt, rt) in enumerate(
                    zip(self.ids(prompts), self.ids(reals), prompts, reals, strict=True)
                )
            ]
            pq.write_table(
                pa.Table.from_pylist(self.prepared[split], schema=PREPARED), directory / f"{split}.parquet"
            )
            counts[split] = {"rows": number}
        files = ["train.parquet", "heldout.parquet"]
        inputs = {"train": "ab" * 32, "config": {"format": "messages"}}
        write_manifest(directory, stage="prepare", files=files, inputs=inputs, counts=counts)

    def generated(self, iteration: int) -> None:
        directory = self.run.iteration(iteration).generated
        directory.mkdir()
        self.pairs[iteration] = {}
        files, counts = [], {}
        for split, rows in self.prepared.items():
            answers = [
                self.shape.answer(self.chance) for _ in rows for _ in range(self.shape.num_generations)
            ]
            ids = self.ids(answers)
            pairs = []
            for index, generated in enumerate(ids):
                row = rows[index // self.shape.num_generations]
                equal = self.chance.random() < 0.04 * (iteration + 1)
                cut = not equal and self.chance.random() < 0.08
                taken = row["real_ids"] if equal else generated[:-1] if cut else generated
                pairs.append(
                    {
                        "id": row["id"],
                        "sample": index % self.shape.num_generations,
                        "iteration": iteration,
                        "prompt_ids": row["prompt_ids"],
                        "real_ids": row["real_ids"],
                        "generated_ids": taken,
                        "finish_reason": "length" if cut else "stop",
                        "sampler_logps": -2.0 * len(taken),
                        "num_sampler_tokens": len(taken),
                        "opponent_sha256": "cd" * 32,
                        "real_logp": -2.2 * len(row["real_ids"]) * random.Random(row["id"]).uniform(0.8, 1.2),
                        "generated_logp": -1.7 * len(taken) * self.chance.uniform(0.8, 1.2),
                    }
                )
            self.pairs[iteration][split] = pairs
            table = pa.Table.from_pylist(
                [{k: p[k] for k in GENERATED.names} for p in pairs], schema=GENERATED
            )
            middle = table.num_rows // 2
            for shard, piece in enumerate((table.slice(0, middle), table.slice(middle))):
                files.append(f"{split}-shard-{shard:05d}-of-00002.parquet")
                pq.write_table(piece, directory / files[-1])
            counts[split] = count_answers([table])
        write_manifest(
            directory, stage="generate", files=files, inputs={"opponent": "cd" * 32}, counts=counts
        )

    def logps(self, pair: dict[str, Any], now: int) -> tuple[float, float]:
        """Under theta_now: real responses gain, answers of an earlier iteration lose."""
        age = now - pair["iteration"]
        noise = random.Random(f"{pair['id']} {pair['iteration']}").uniform(-1.0, 3.0)
        luck = random.Random(f"{pair['id']} {now}").gauss(0, 0.5)
        real = pair["real_logp"] + self.shape.drift * now * len(pair["real_ids"]) + luck
        return real, pair["generated_logp"] - age * (4.0 + noise * 3)

    def scored(self, iteration: int) -> None:
        directory = self.run.iteration(iteration).scored
        directory.mkdir()
        files = []
        for of in range(max(0, iteration - self.shape.history), iteration + 1):
            for split in ("train", "heldout") if of == iteration else ("train",):
                rows = []
                for pair in self.pairs[of][split]:
                    real, generated = self.logps(pair, iteration)
                    rows.append(
                        {
                            **{k: pair[k] for k in GENERATED.names},
                            "opponent_real_logps": real,
                            "opponent_generated_logps": generated,
                        }
                    )
                files.append(f"{split}-iter_{of:02d}-shard-00000-of-00001.parquet")
                pq.write_table(pa.Table.from_pylist(rows, schema=SCORED), directory / files[-1])
        counts = {"pairs": 1, "sampler_difference": 2.8e-7}
        write_manifest(directory, stage="score", files=files, inputs={"opponent": "cd" * 32}, counts=counts)

    def trained(self, iteration: int) -> None:
        files = self.run.iteration(iteration)
        lines = [metrics_line(step, self.shape, iteration, self.chance) for step in range(self.shape.steps)]
        for step in {self.shape.steps // 2, self.shape.steps - 1}:
            lines.append({**metrics_line(step, self.shape, iteration, self.chance), "split": "heldout"})
        files.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        files.train.mkdir()
        last = {k: v for k, v in lines[-1].items() if k not in ("split", "step")}
        counts = {"steps": self.shape.steps, "first_loss": math.log(2), **last}
        counts |= {f"heldout_{k}": v for k, v in last.items() if k not in ("grad_norm", "lr")}
        inputs = {"config": {"spin.beta": BETA, "spin.loss": "logistic"}, "scored": "ef" * 32}
        write_manifest(files.train, stage="train", files=[], inputs=inputs, counts=counts)

    def evaluation(self, model: int, directory: Path, numbers: Path) -> None:
        directory.mkdir(parents=True)
        rows: list[dict[str, Any]] = []
        results: dict[str, Any] = {}
        for way in ("sampled", "greedy"):
            right = min(0.95, 0.45 + 0.1 * model + (0.2 if way == "greedy" else 0.0))
            scores = []
            for row in self.prepared["heldout"]:
                is_right = self.chance.random() < right
                scores.append(float(is_right))
                rows.append(
                    {
                        "pass": way,
                        "id": row["id"],
                        "prompt_text": row["prompt_text"],
                        "real_text": row["real_text"],
                        "response_text": row["real_text"] if is_right else self.shape.answer(self.chance),
                        "score": float(is_right) if self.shape.scorer else None,
                        "finish_reason": "stop",
                        "num_sampler_tokens": 12,
                        "sampler_logps": -9.0,
                    }
                )
            score = sum(scores) / max(1, len(scores)) if self.shape.scorer else None
            results[way] = {
                "score": score,
                "mean_length": 12.0 + model,
                "cut_share": 0.02,
                "equal_share": right,
            }
        shots, metric = published.TASKS["gsm8k"]
        asked = {"num_fewshot": shots, "asked_metric": metric, "limit": None}
        results["benchmarks"] = {"gsm8k": {"value": 0.25 + 0.05 * model, **asked}}
        pq.write_table(pa.Table.from_pylist(rows, schema=ANSWERS), directory / "evaluation.parquet")
        write_manifest(directory, stage="evaluate", files=["evaluation.parquet"], inputs={}, counts=results)
        write_json(numbers, results)


def metrics_line(step: int, shape: Shape, iteration: int, chance: random.Random) -> dict[str, Any]:
    """One line of metrics.jsonl, on a curve that falls and wobbles."""
    done = step / max(1, shape.steps - 1)
    margin = 0.0 if step == 0 else 1.4 * (1 - math.exp(-3 * done)) * (1 + 0.25 * chance.gauss(0, 1))
    real = -2.2 + shape.drift * (iteration + done) + 0.03 * chance.gauss(0, 1)
    generated = -1.7 - 0.3 * done + 0.03 * chance.gauss(0, 1)
    return {
        "split": "train",
        "loss": math.log1p(math.exp(-margin)),
        "start_loss": math.log(2),
        "margin": margin,
        "policy_real_logps": real * 40,
        "policy_generated_logps": generated * 44,
        "opponent_real_logps": (-2.2 + shape.drift * iteration) * 40,
        "opponent_generated_logps": -1.7 * 44,
        "real_tokens": 40.0,
        "generated_tokens": 44.0,
        "units": 64.0,
        "accuracy": min(1.0, 0.5 + 0.45 * done + 0.03 * chance.gauss(0, 1)) if step else 0.0,
        "policy_real_logps_per_token": real,
        "policy_generated_logps_per_token": generated,
        "step": step,
        "response_tokens": 5400.0,
        "real_rewards": margin / 3,
        "generated_rewards": -2 * margin / 3,
        "useful_tokens": 8200,
        "tokens_per_second": 8200 / (0.5 + 0.05 * chance.random()),
        "peak_share": None,
        "forward_backward_seconds": 0.4,
        "grad_norm": 2.4 * math.exp(-done) * (1 + 0.2 * chance.random()),
        "lr": 1e-6 * min(1.0, (step + 1) / (0.1 * shape.steps + 1)) * (1 - done * 0.95),
    }
