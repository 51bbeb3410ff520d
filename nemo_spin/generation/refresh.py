"""New weights into a vLLM engine that lives on: what the installed version offers.

| vLLM | exchanging weights |
|---|---|
| up to 0.14 | `reload_weights` takes no directory and may read the old files again: not used |
| since layerwise reloading (verified with 0.32) | `reload_weights(weights_path=…)` on every worker |

What was looked at and is not used: `apply_model(load_weights)` loads over weights that were
already packed for the kernels and corrupts them; the transfer API's back ends need CUDA;
`sleep` and `wake_up` hang on CPU. Where nothing is offered a new engine is started.
"""

from __future__ import annotations

import inspect
from typing import Any

from nemo_spin.errors import GenerationError, explain

RELOAD = "reload_weights"
PATH_ARGUMENT = "weights_path"


def can_reload() -> bool:
    """Whether the installed vLLM loads weights from another directory into a living engine."""
    try:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # the CPU's is derived from it

        return PATH_ARGUMENT in inspect.signature(GPUModelRunner.reload_weights).parameters
    except (ImportError, AttributeError):
        return False


def reload_weights(llm: Any, model_dir: str) -> None:
    """Has every worker of a `vllm.LLM` load other weights of the same architecture.

    vLLM does not say what went wrong, and what is left afterwards may be a mixture: on any
    exception the engine has to go.

    Raises:
        GenerationError: Keys and values of the old weights are still in use.
        Exception: Whatever vLLM raises.
    """
    llm.collective_rpc(RELOAD, kwargs={PATH_ARGUMENT: model_dir})
    if not llm.reset_prefix_cache():  # it holds keys and values of the old weights
        raise GenerationError(
            explain(
                model_dir,
                found="vLLM did not give up keys and values of the weights it had before",
                rule="answers come from one model",
                remedy="a new engine is needed (generation.keep_engine=never starts one for every stage)",
            )
        )
