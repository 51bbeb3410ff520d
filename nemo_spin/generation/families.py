"""What of the models that can be trained here vLLM cannot sample."""

from __future__ import annotations

from pathlib import Path

from nemo_spin.bridge.families import architecture_of
from nemo_spin.errors import ConfigError, explain
from nemo_spin.megatron.architecture import Architecture


def missing_in_vllm(model: Architecture) -> str | None:
    """Why vLLM 0.32 cannot answer for such a model; None where it can."""
    if model.family == "gpt_neo":
        return "vLLM has no GPT-Neo"
    if model.family == "qwen2" and model.windows and None in model.windows:
        return "vLLM refuses Qwen2 with windows in some layers only"
    if model.family == "gpt2" and model.softmax_scale is not None:
        return "vLLM scales GPT-2's attention although scale_attn_weights is false"
    return None


def check_sampled(model_dir: Path) -> None:
    """Refuses a model before anything is started where vLLM would do so, or answer as another one.

    Raises:
        ConfigError: vLLM cannot sample it.
    """
    missing = missing_in_vllm(architecture_of(model_dir))
    if missing is None:
        return
    raise ConfigError(
        explain(
            f"model.path={model_dir}",
            found=missing,
            rule="self-play and evaluations draw answers from the model, with vLLM",
            remedy="choose another model; this one can be fine-tuned (nemo-spin sft), and trained on answers "
            "that came with the data (data.use_generations with spin.iterations=1, evaluation.enabled=false)",
        )
    )
