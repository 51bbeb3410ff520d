"""One engine that keeps theta_0, and is given the adapters of one iteration after the other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nemo_spin.bridge.families import architecture_of
from nemo_spin.bridge.peft_files import adapter_shapes, peft_config, projection_names
from nemo_spin.config.schema import LoraConfig
from nemo_spin.generation.keeper import EngineKeeper
from tests.functional.generation.harness import Stage, configuration
from tests.functional.generation.test_refresh import canary_of, run

LORA = LoraConfig(rank=3, alpha=6.0, export_adapter=True)


def write_adapter(base: Path, directory: Path, *, count: int) -> tuple[Path, Path]:
    """A random adapter of `count` iterations, and the model it is merged into by hand."""
    architecture = architecture_of(base)
    generator = torch.Generator().manual_seed(count)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.1
        for name, shape in adapter_shapes(architecture, LORA, count=count).items()
    }
    adapter = directory / f"adapter_{count}"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    modules = list(projection_names(architecture, LORA).values())
    config = peft_config(LORA, modules, base=base, count=count)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merged = shutil.copytree(base, directory / f"merged_{count}")
    weights = load_file(base / "model.safetensors")
    for name, a in tensors.items():
        if ".lora_A." in name:
            weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
            weights[weight] += 6.0 / 3 * tensors[name.replace(".lora_A.", ".lora_B.")] @ a
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    return adapter, merged


def test_adapters_beside_theta_0_answer_like_models_they_are_merged_into(
    tiny_model: Path, prepared_dir: Path, tmp_path: Path
) -> None:
    """theta_0 first, then an adapter of one iteration and one of two; the canaries are of merged models."""
    config = configuration(adapters=True)
    config.model.lora = LORA
    config.spin.iterations = 3
    keeper = EngineKeeper()
    theta_0 = Stage(tiny_model, prepared_dir, tmp_path / "theta_0", config=config, keeper=keeper)
    try:
        started, pid = run(theta_0)
        assert started.notes["engine"]["way"] == "started"
        answers = [theta_0.table()["generated_ids"].to_pylist()]
        for count in (1, 2):
            adapter, merged = write_adapter(tiny_model, tmp_path, count=count)
            stage = replace(
                theta_0,
                directory=tmp_path / f"theta_{count}",
                adapter_dir=adapter,
                opponent_sha256=str(count) * 64,
                canary_path=canary_of(merged, tmp_path / f"canary_{count}.json"),
            )
            manifest, same = run(stage)
            assert same == pid, "the engine lives on"
            engine = manifest.notes["engine"]
            assert engine["way"] == "adapted"
            assert engine["canary_texts"] == 4 and engine["canary_difference"] < 1e-4
            assert engine["seconds"] < started.notes["engine"]["seconds"] / 10
            answers.append(stage.table()["generated_ids"].to_pylist())
        assert answers[0] != answers[1] != answers[2]
        again = replace(theta_0, directory=tmp_path / "again")
        run(again)
        assert again.table()["generated_ids"].to_pylist() == answers[0], "no adapter is left behind"
    finally:
        keeper.close()
