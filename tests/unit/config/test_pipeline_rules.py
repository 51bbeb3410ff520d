"""How layers are spread over stages, and what of it is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_spin.config.pipeline_rules import layers_fit, layers_of_chunks, layers_of_stages
from nemo_spin.config.schema import Config, ModelConfig
from tests.unit.config.test_validate import accepted, refused

FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
EMBEDDING, LOSS = "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"


def model(stages: int, chunks: int | None = None, **uneven: Any) -> ModelConfig:
    return ModelConfig(
        pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=chunks, **uneven
    )


@pytest.mark.parametrize(
    ("split", "num_layers", "layers"),
    [
        (model(1), 5, (5,)),
        (model(4), 32, (8, 8, 8, 8)),
        (model(4), 30, None),
        (model(4, **{FIRST: 6}), 30, (6, 8, 8, 8)),
        (model(4, **{FIRST: 7, LAST: 7}), 32, (7, 9, 9, 7)),
        (model(4, **{LAST: 7}), 32, None),
        (model(2, **{FIRST: 5, LAST: 3}), 8, (5, 3)),
        (model(2, **{FIRST: 5, LAST: 4}), 8, None),
        (model(2, **{FIRST: 8}), 8, None),  # nothing is left for the second
        (model(4, **{EMBEDDING: True, LOSS: True}), 30, (7, 8, 8, 7)),
        (model(2, **{EMBEDDING: True}), 3, (1, 2)),
        (model(4, **{EMBEDDING: True, LOSS: True}), 2, (0, 1, 1, 0)),
        (model(2, 2), 6, None),
        (model(2, 2, **{FIRST: 2}), 6, (2, 4)),
        (model(2, 2, **{EMBEDDING: True}), 7, (3, 4)),
    ],
)
def test_layers_of_stages(split: ModelConfig, num_layers: int, layers: tuple[int, ...] | None) -> None:
    assert layers_of_stages(split, num_layers) == layers


def test_the_ends_give_up_a_layer_of_their_first_and_last_chunk() -> None:
    assert layers_of_chunks(model(2, 2, **{EMBEDDING: True, LOSS: True}), 6) == [[1, 2], [2, 1]]


@given(
    stages=st.integers(1, 4),
    chunks=st.sampled_from([None, 2, 3]),
    num_layers=st.integers(1, 24),
    first=st.none() | st.integers(1, 8),
    last=st.none() | st.integers(1, 8),
)
def test_no_layer_is_lost(
    stages: int, chunks: int | None, num_layers: int, first: int | None, last: int | None
) -> None:
    layers = layers_of_stages(model(stages, chunks, **{FIRST: first, LAST: last}), num_layers)
    if layers is not None and stages > 1:
        assert sum(layers) == num_layers and len(layers) == stages
        assert layers[0] == (first or layers[0]) and layers[-1] == (last or layers[-1])
        assert len(set(layers[1:-1])) <= 1


def unfit(num_layers: int, split: ModelConfig) -> str:
    (found,) = layers_fit(Config(model=split), num_layers)
    return found.text


def test_layers_that_do_not_divide_are_refused_with_what_would_fit() -> None:
    text = unfit(30, model(4))
    assert "model.pipeline_model_parallel_size: 4 does not divide the model's 30 layers" in text
    assert "set it to one of 1, 2, 3, 5, 6, 10, 15, 30" in text
    assert "or model.num_layers_in_first_pipeline_stage to 6" in text
    assert layers_of_stages(model(4, **{FIRST: 6}), 30) is not None
    interleaved = unfit(6, model(2, 2))
    assert "2 x model.virtual_pipeline_model_parallel_size 2 does not divide" in interleaved
    assert "or model.num_layers_in_first_pipeline_stage to 2" in interleaved
    assert "set model.virtual_pipeline_model_parallel_size to null" in unfit(7, model(2, 2))
    uneven = unfit(8, model(2, **{FIRST: 5, LAST: 4}))
    assert f"with model.{FIRST} 5, model.{LAST} 4" in uneven
    assert layers_fit(Config(model=model(2, **{FIRST: 5})), 8) == []


PIPELINE = ("trainer.devices=2", "model.pipeline_model_parallel_size=2")


def test_uneven_stages_need_stages() -> None:
    assert "a single stage has all layers" in refused(f"model.{FIRST}=2")
    assert "a single stage has all layers" in refused(f"model.{LOSS}=true")
    accepted(*PIPELINE, f"model.{FIRST}=2")
    accepted(*PIPELINE, f"model.{EMBEDDING}=true", f"model.{LOSS}=true")


def test_one_way_of_being_uneven() -> None:
    message = refused(*PIPELINE, f"model.{LAST}=2", f"model.{LOSS}=true")
    assert f"model.{LAST}: given beside model.{LOSS}" in message and "keep one of the two ways" in message


def test_given_layers_are_divided_over_chunks() -> None:
    message = refused(*PIPELINE, "model.virtual_pipeline_model_parallel_size=2", f"model.{LAST}=3")
    assert "set it to a multiple of 2" in message
