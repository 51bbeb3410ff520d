"""What vLLM cannot sample. That it answers for the rest: `tests/functional/generation/test_families.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_spin.errors import ConfigError
from nemo_spin.generation.families import check_sampled
from tests.unit.bridge.checkpoints import CLASSES, edit_config, make_checkpoint

REFUSED = {"gpt_neo": "GPT-Neo", "qwen2": "windows in some layers", "gpt2": "scale_attn_weights"}


@pytest.mark.parametrize("family", CLASSES)
def test_refused_is_what_vllm_has_not(tmp_path: Path, family: str) -> None:
    directory = make_checkpoint(tmp_path, family)
    if family not in REFUSED:
        check_sampled(directory)
        return
    with pytest.raises(ConfigError, match=REFUSED[family]) as caught:
        check_sampled(directory)
    for part in (f"model.path={directory}", "rule:", "remedy:"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("family", "key", "value"), [("qwen2", "use_sliding_window", False), ("gpt2", "scale_attn_weights", True)]
)
def test_properties_are_refused_and_not_their_family(
    tmp_path: Path, family: str, key: str, value: bool
) -> None:
    check_sampled(edit_config(make_checkpoint(tmp_path, family), **{key: value}))
