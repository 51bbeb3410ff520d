"""Measures vLLM with random weights of the 0.5B shape: 256 prompts of 128 tokens, 256 answers of 256."""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 151936,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
_TINY_MORE = {"head_dim": 32, "vocab_size": 300}


def main(tiny: bool) -> None:
    """Prints tokens/s of the second of two equal batches."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    settings = {**_MODEL, **_TINY, **_TINY_MORE} if tiny else _MODEL
    prompts, tokens = (4, 8) if tiny else (256, 256)
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(settings), encoding="utf-8")
        engine = LLM(
            model=directory,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=512,
            max_num_seqs=prompts,
            enforce_eager=tiny,
            seed=0,
            **({"kv_cache_memory_bytes": 1 << 24} if tiny else {"gpu_memory_utilization": 0.8}),
        )
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, seed=1)
        chance = random.Random(0)
        for _ in range(2):
            batch = [
                {"prompt_token_ids": [chance.randrange(3, 300) for _ in range(128)]} for _ in range(prompts)
            ]
            start = time.perf_counter()
            outputs = engine.generate(batch, sampling, use_tqdm=False)
            seconds = time.perf_counter() - start
        count = sum(len(output.outputs[0].token_ids) for output in outputs)
        name = "tiny" if tiny else "0.5B"
        print(json.dumps({"model": name, "tokens_per_second": count / seconds}), flush=True)


if __name__ == "__main__":
    main("--tiny" in sys.argv)
