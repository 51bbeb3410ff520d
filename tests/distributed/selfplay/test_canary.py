"""What Megatron leaves about a few texts, against a float64 forward pass of `transformers`."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_spin.generation.canary import Canary, read_canary
from tests import models, prepared
from tests.distributed.harness import run_ranks


def _record(tp_size: int, pp_size: int, model_dir: Path, run_dir: Path, stored_dtype: str) -> None:
    from nemo_spin.bridge.import_hf import load_weights
    from nemo_spin.config.schema import Config, GenerationConfig, ModelConfig, TrainerConfig
    from nemo_spin.data.progress import SilentProgress
    from nemo_spin.megatron.runtime import initialize
    from nemo_spin.selfplay.ranks.canary import record_canary, round_to_stored
    from nemo_spin.selfplay.ranks.context import StageContext
    from nemo_spin.selfplay.run_directory import RunDirectory

    config = Config(
        model=ModelConfig(
            path=str(model_dir), tensor_model_parallel_size=tp_size, pipeline_model_parallel_size=pp_size
        ),
        generation=GenerationConfig(max_tokens=6),
        trainer=TrainerConfig(precision="32"),
    )
    runtime = initialize(
        tensor_model_parallel_size=tp_size, pipeline_model_parallel_size=pp_size, seed=1, timeout_s=60
    )
    context = StageContext(config, RunDirectory(run_dir), 0, runtime, SilentProgress(), {})
    engine, _ = context.build_engine(
        model_dir, lambda chunks, architecture: load_weights(chunks, model_dir, architecture)
    )
    round_to_stored(engine.chunks, stored_dtype)
    record_canary(context, engine)


def difference(canary: Canary, model_dir: Path, *, rounded_to: torch.dtype) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for parameter in model.parameters():  # and no buffer: RoPE's frequencies are not stored
        parameter.data = parameter.data.to(rounded_to).float()
    model.double()
    values = []
    for ids in canary.token_ids():
        with torch.no_grad():
            logps = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
        values.append(logps[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist())
    return canary.difference(values)


def test_it_says_what_an_engine_with_the_stored_weights_has_to_say(tmp_path: Path) -> None:
    """Trained in float32 and stored in bfloat16: the rounded weights are the ones that are served."""
    model_dir = models.write_model(tmp_path / "model")
    rows = prepared.rows(12, seed=1)
    prepared.write(tmp_path / "run" / "data", train=rows)
    run_ranks(_record, 4, 2, 2, model_dir, tmp_path / "run", "BF16")
    canary = read_canary(tmp_path / "run" / "iter_00" / "canary.json")
    assert canary is not None
    assert canary.precision == "32"
    assert [text.prompt_ids for text in canary.texts] == [row["prompt_ids"] for row in rows[:8]]
    cut = [row["real_ids"][:5] for row in rows[:8]]  # type: ignore[index]
    assert [text.response_ids for text in canary.texts] == cut
    assert difference(canary, model_dir, rounded_to=torch.bfloat16) < 1e-5
    assert difference(canary, model_dir, rounded_to=torch.float32) > 1e-4, "rounding shows, 1e-3 here"
