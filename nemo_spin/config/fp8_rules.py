"""Rules about `model.fp8`: matrix products in 8 bits, through Transformer Engine's recipes."""

from __future__ import annotations

from nemo_spin.config.mistakes import Mistake, mistake, raise_together
from nemo_spin.config.schema import Config

FP8_KEYS = (
    "model.fp8",
    "model.transformer_impl",
    "trainer.accelerator",
    "trainer.precision",
    "spin.gates.ln2_tolerance",
)
_LEAST_LN2_TOLERANCE = 0.01


def width_multiple(fp8_recipe: str) -> int:
    """What rows and columns of an 8-bit product must be multiples of: its kernels read whole blocks."""
    return 32 if fp8_recipe == "mxfp8" else 16


def fp8_has_what_it_needs(config: Config) -> list[Mistake]:
    """Transformer Engine's layers on a GPU, bfloat16 around them, and a gate that allows for rounding."""
    model, gates = config.model, config.spin.gates
    if model.fp8 is None:
        return []
    needs = (
        (
            "trainer.accelerator",
            config.trainer.accelerator == "cpu",
            "8-bit matrix products are instructions of GPUs from Ada and Hopper on",
            "set model.fp8 to null, or trainer.accelerator to auto",
        ),
        (
            "model.transformer_impl",
            model.transformer_impl == "local",
            "Transformer Engine's layers choose the scales of 8-bit tensors; the local ones have none",
            "set it to auto or transformer_engine, or model.fp8 to null",
        ),
        (
            "trainer.precision",
            config.trainer.precision == "32",
            "weights and activations between 8-bit products are bfloat16",
            "set it to bf16 or auto, or model.fp8 to null",
        ),
        (
            "spin.gates.ln2_tolerance",
            gates.ln2_tolerance is not None and gates.ln2_tolerance < _LEAST_LN2_TOLERANCE,
            f"null or at least {_LEAST_LN2_TOLERANCE}: an 8-bit scale depends on what else is in the "
            "microbatch, and scoring and training cut theirs differently",
            f"set it to {_LEAST_LN2_TOLERANCE}",
        ),
    )
    return [
        mistake(
            key,
            found=f"{_value_at(config, key)}, with model.fp8 {model.fp8}",
            rule=rule,
            remedy=remedy,
            also=("model.fp8",),
        )
        for key, broken, rule, remedy in needs
        if broken
    ]


def check_fp8_fits(
    config: Config,
    *,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    head_dim: int,
) -> None:
    """Checks that the model's linear layers have widths that 8-bit products take.

    Args:
        config: The configuration; without `model.fp8` everything fits.
        hidden_size: Width of the model.
        ffn_hidden_size: Width of the gated MLP.
        num_attention_heads: Heads of the queries.
        num_query_groups: Heads of the keys and values.
        head_dim: Channels of a head.

    Raises:
        ConfigError: They have not; the message lists every width that does not fit.
    """
    model = config.model
    if model.fp8 is None:
        return
    ranks, multiple = model.tensor_model_parallel_size, width_multiple(model.fp8_recipe)
    widths = (
        ("hidden size", hidden_size),
        (f"MLP columns of each of {ranks} ranks", ffn_hidden_size // ranks),
        (f"query channels of each of {ranks} ranks", num_attention_heads * head_dim // ranks),
        (f"key and value channels of each of {ranks} ranks", 2 * num_query_groups * head_dim // ranks),
    )
    raise_together(
        [
            mistake(
                "model.fp8",
                found=f"{model.fp8} with a model whose {what} are {width}",
                rule=f"8-bit products ({model.fp8_recipe}) take multiples of {multiple}",
                remedy="set model.fp8 to null"
                + ("" if ranks == 1 else ", or lower model.tensor_model_parallel_size"),
                also=("model.fp8_recipe", "model.tensor_model_parallel_size"),
            )
            for what, width in widths
            if width % multiple
        ]
    )


def _value_at(config: Config, key: str) -> object:
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
