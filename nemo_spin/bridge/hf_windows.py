"""Which layers see how far back, as config.json describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_spin.bridge.hf_values import count, flag, refuse

_KINDS = ("full_attention", "sliding_attention")


def read_windows(values: Mapping[str, Any], *, num_layers: int, max_positions: int) -> tuple[int | None, ...]:
    """The window of each layer (`Architecture.windows`).

    The layers with one are those that `layer_types` names, or all but every n-th where there is
    a `sliding_window_pattern` n, or those from `max_window_layers` on.

    Raises:
        CheckpointError: A value is wrong.
    """
    if values.get("sliding_window") is None or not flag(values, "use_sliding_window"):
        return ()
    kinds = values.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != num_layers or any(k not in _KINDS for k in kinds):
            rule = f"is one of {', '.join(_KINDS)} for each of {num_layers} layers"
            raise refuse("layer_types", kinds, rule, "mend config.json, or choose another model")
        has_window = [kind == "sliding_attention" for kind in kinds]
    elif values.get("sliding_window_pattern") is not None:
        pattern = count(values, "sliding_window_pattern")
        has_window = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    else:
        first = values.get("max_window_layers", 0)
        if not isinstance(first, int):
            raise refuse("max_window_layers", first, "is a number of layers", "mend config.json")
        has_window = [layer >= first for layer in range(num_layers)]
    return windows_of(has_window, count(values, "sliding_window"), max_positions)


def windows_of(has_window: Sequence[bool], window: int, max_positions: int) -> tuple[int | None, ...]:
    """`window` where a layer has it; empty where it hides nothing within the model's context."""
    if not any(has_window) or window >= max_positions:
        return ()
    return tuple(window if has_it else None for has_it in has_window)
