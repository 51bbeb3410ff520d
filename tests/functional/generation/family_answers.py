"""Run by vLLM's Python: loads one model after the other and answers the same prompts greedily.

Reads {"models": {name: directory}, "prompts": [[ids]], "max_tokens": n} from the file named first
and writes {name: [[ids]] or the error's text} to the second.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from nemo_spin.generation.engine import Prompt, Sampling
from nemo_spin.generation.request import EngineSettings


def _answers(directory: str, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    from nemo_spin.generation.vllm_offline import VllmOffline

    settings = EngineSettings(
        name="vllm",
        model_dir=directory,
        dtype="float32",
        tensor_parallel_size=1,
        max_model_len=64,
        max_num_seqs=8,
        kv_cache_bytes=16 << 20,
        kv_numbers_per_token=1024,
        vocab_size=89,
        model_sha256=directory,
    )
    engine = VllmOffline(settings)
    sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=max_tokens, stop_token_ids=())
    asked = [Prompt(token_ids=ids, seed=0, max_tokens=max_tokens) for ids in prompts]
    return [answer.token_ids for answer in engine.answer(asked, sampling, lambda done: None)]


def main() -> None:
    """See the module."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    answers: dict[str, Any] = {}
    for name, directory in asked["models"].items():
        try:
            answers[name] = _answers(directory, asked["prompts"], asked["max_tokens"])
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}"
        gc.collect()  # an engine's memory, before the next
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
