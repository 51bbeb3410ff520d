"""vLLM in the sampler's own process: loads a directory, answers batches of prompts.

Imported by the worker alone. vLLM changes its host's random state, threads and
environment, so nothing else lives in that process.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from nemo_spin.generation import adapters
from nemo_spin.generation.answers import checked_answer, unexpected
from nemo_spin.generation.capacity import kv_cache_bytes, memory_bytes
from nemo_spin.generation.engine import Answer, Prompt, Sampling
from nemo_spin.generation.refresh import can_reload, reload_weights
from nemo_spin.generation.request import EngineSettings

_CPU_BATCHED_TOKENS = 8192  # per step; at least the longest request


def prepare_environment(settings: EngineSettings) -> None:
    """Sets what vLLM reads from the environment; to be called before it is imported.

    What the user has set stays as it is.
    """
    several = settings.tensor_parallel_size > 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if several else "0",  # one device: one process
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads bound to busy cores wait for each other
        "OMP_NUM_THREADS": str(max(1, cores // (settings.tensor_parallel_size * settings.neighbours))),
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # `stage` has compared lengths with the model's own
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if _is_built_for_cpu():
        # Some of its functions are compiled by torch even in eager mode, which takes a C++
        # compiler: many machines have none, and all are to compute the same.
        defaults["TORCHDYNAMO_DISABLE"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _is_built_for_cpu() -> bool:
    """Known from the package's version, as in vLLM, without importing it."""
    try:
        return "cpu" in metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return bool(list(metadata.distributions(name="vllm-cpu")))


def name_package() -> None:
    """Lets `importlib.metadata` answer for vLLM where its package has another name (vllm-cpu).

    Others ask it, such as lm-eval. vLLM tells a CPU build by that name: it must have done so before.
    """
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        import vllm

        known = metadata.version

        def version(distribution_name: str) -> str:
            return str(vllm.__version__) if distribution_name == "vllm" else known(distribution_name)

        metadata.version = version


def llm_arguments(settings: EngineSettings) -> dict[str, Any]:
    """How vLLM loads a model, whoever uses it then; `prepare_environment` comes first.

    Raises:
        GenerationError: Keys and values do not fit into memory.
    """
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16"
    cache_bytes = settings.kv_cache_bytes
    if cache_bytes is None and on_cpu:
        cache_bytes = kv_cache_bytes(
            dtype=dtype,
            kv_numbers_per_token=settings.kv_numbers_per_token,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            memory_bytes=memory_bytes() // settings.neighbours,
        )
    return {
        "model": settings.model_dir,
        "dtype": dtype,
        "trust_remote_code": False,
        "config_format": "hf",  # what was checked, and no other files that may lie beside it:
        "load_format": "safetensors",  # no pickles, no consolidated.safetensors
        "tensor_parallel_size": settings.tensor_parallel_size,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "kv_cache_memory_bytes": cache_bytes,
        "enforce_eager": on_cpu,
        # vLLM cannot split a seeded request's prompt over steps on CPU: its generator has no offset
        "enable_chunked_prefill": False if on_cpu else None,
        "max_num_batched_tokens": max(settings.max_model_len, _CPU_BATCHED_TOKENS) if on_cpu else None,
        "enable_prefix_caching": True,  # the answers to one prompt share it
        "generation_config": "vllm",  # no sampling settings from the model's directory
        "disable_log_stats": True,
    }


class VllmOffline:
    """A model in vLLM; see `engine.Engine`.

    Args:
        settings: How it is loaded.

    Raises:
        GenerationError: Its keys and values do not fit into memory.
        Exception: Whatever vLLM raises.
    """

    is_new = True

    def __init__(self, settings: EngineSettings) -> None:
        prepare_environment(settings)
        import torch
        import vllm
        from vllm.platforms import current_platform

        torch.zeros(1, device="cpu").cos()  # see megatron/cpu.py, `choose_vector_kernels`
        on_cpu = current_platform.is_cpu()
        self.device = "cpu" if on_cpu else str(current_platform.device_type)
        self._takes_adapters = settings.max_adapter_rank > 0
        self._num_adapters = 1
        self._adapter = adapters.request_of(settings.adapter_dir, self._num_adapters)
        self.can_refresh = self._takes_adapters or can_reload()
        self._params = vllm.SamplingParams
        self._llm = vllm.LLM(
            **llm_arguments(settings),
            skip_tokenizer_init=True,  # token ids in, token ids out
            logprobs_mode="raw_logprobs",
            seed=0,
            **adapters.engine_arguments(settings),
        )

    def answer(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_done: Callable[[int], None]
    ) -> list[Answer]:
        """See `Engine.answer`."""
        # What is cached decides which tokens are computed together, and so the last bits of
        # a number: an answer must not depend on what was asked before.
        if not self._llm.reset_prefix_cache():
            raise unexpected("it did not give up its prefix cache")
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt.token_ids} for prompt in prompts],
            [self._sampling_params(prompt, sampling) for prompt in prompts],
            use_tqdm=_progress_bar(on_done),
            lora_request=self._adapter,
        )
        if len(outputs) != len(prompts):
            raise unexpected(f"{len(outputs)} answers to {len(prompts)} prompts")
        return [_answer(output, prompt, sampling) for output, prompt in zip(outputs, prompts, strict=True)]

    def logps(self, texts: Sequence[list[int]]) -> list[list[float]]:
        """See `Engine.logps`."""
        outputs = self._llm.generate(
            [{"prompt_token_ids": text} for text in texts],
            self._params(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False),
            use_tqdm=False,
            lora_request=self._adapter,
        )
        values = []
        for text, output in zip(texts, outputs, strict=True):
            entries = output.prompt_logprobs
            if entries is None or len(entries) != len(text):
                raise unexpected("a prompt without the log-probability of each token")
            values.append(
                [float(entry[token].logprob) for entry, token in zip(entries[1:], text[1:], strict=True)]
            )
        return values

    def refresh(self, settings: EngineSettings) -> None:
        """See `Engine.refresh`."""
        if not self._takes_adapters:
            reload_weights(self._llm, settings.model_dir)
            return
        self._num_adapters += 1
        self._adapter = adapters.request_of(settings.adapter_dir, self._num_adapters)

    def _sampling_params(self, prompt: Prompt, sampling: Sampling) -> Any:
        return self._params(
            n=1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=prompt.max_tokens,
            seed=prompt.seed,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # the stop ids say all
            logprobs=0,  # of the drawn token alone
            detokenize=False,
            skip_special_tokens=False,
        )


def _progress_bar(on_done: Callable[[int], None]) -> Callable[..., Any]:
    """A progress bar for vLLM that draws nothing and passes on how many prompts were answered."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, desc: str = "", **kwargs: Any) -> None:
            self._counts = desc.startswith("Processed")  # not while requests are handed in
            super().__init__(*args, desc=desc, **{**kwargs, "file": io.StringIO(), "mininterval": 60.0})

        def update(self, n: float | None = 1) -> None:
            if self._counts and n:
                on_done(int(n))
            super().update(n)

    return Bar


def _answer(output: Any, prompt: Prompt, sampling: Sampling) -> Answer:
    """Takes what vLLM returned."""
    if not output.finished or len(output.outputs) != 1:
        raise unexpected("an answer that is not finished")
    completion = output.outputs[0]
    token_ids = [int(token) for token in completion.token_ids]
    logprobs = completion.logprobs
    if logprobs is None or len(logprobs) != len(token_ids):
        raise unexpected("an answer without the log-probability of each token")
    logps = [float(entry[token].logprob) for entry, token in zip(logprobs, token_ids, strict=True)]
    return checked_answer(token_ids, logps, completion.finish_reason, prompt=prompt, sampling=sampling)
