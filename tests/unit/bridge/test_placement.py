"""Names, blocks and bits; where parameters really go is shown by `tests/distributed/bridge`."""

import dataclasses
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nemo_spin.bridge import placement
from nemo_spin.bridge.families import families, family_of
from nemo_spin.bridge.mappings import Mapping, Piece, Share
from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture

ARCHITECTURE = Architecture(
    family="llama",
    hf_architecture="LlamaForCausalLM",
    num_layers=4,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=2,
    num_query_groups=1,
    head_dim=4,
    vocab_size=11,
    max_position_embeddings=16,
    norm_epsilon=1e-6,
)


class _Holder(nn.Module):
    """A module with whatever parameters and children it is given."""

    def __init__(self, **members: Any) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def _stage(layer_number: int, **layer: Any) -> nn.Module:
    """A pipeline stage whose only layer is number `layer_number` (from 1, as Megatron counts)."""
    return _Holder(decoder=_Holder(layers=nn.ModuleList([_Holder(layer_number=layer_number, **layer)])))


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(
        get_tensor_model_parallel_rank=lambda: 0,
        get_tensor_model_parallel_world_size=lambda: 1,
        get_data_parallel_rank=lambda with_context_parallel: 0,
        get_data_parallel_group=lambda with_context_parallel: None,
    )
    monkeypatch.setattr(placement, "parallel_state", state)


def test_layers_of_a_later_stage_have_their_number_in_the_whole_model() -> None:
    chunk = _stage(4, mlp=_Holder(linear_fc2=_Holder(weight=_weight(8, 12))))
    (placed,) = placement.place([chunk], ARCHITECTURE)
    assert placed.name == "decoder.layers.3.mlp.linear_fc2.weight"
    assert [piece.tensor for piece in placed.pieces] == ["model.layers.3.mlp.down_proj.weight"]


def test_chunks_of_an_interleaved_stage_have_the_numbers_of_their_own_layers() -> None:
    chunks = [_stage(number, mlp=_Holder(linear_fc2=_Holder(weight=_weight(8, 12)))) for number in (2, 4)]
    placed = placement.place(chunks, ARCHITECTURE)
    assert [entry.name for entry in placed] == [
        "decoder.layers.1.mlp.linear_fc2.weight",
        "decoder.layers.3.mlp.linear_fc2.weight",
    ]


def _holding(parameters: dict[str, nn.Parameter]) -> _Holder:
    """A module with parameters of these dotted names."""
    root = _Holder()
    for name, parameter in parameters.items():
        *path, last = name.split(".")
        module: nn.Module = root
        for part in path:
            if not hasattr(module, part):
                setattr(module, part, _Holder())
            module = getattr(module, part)
        setattr(module, last, parameter)
    return root


def _chunk(architecture: Architecture, layers: list[int], *, first: bool, last: bool) -> nn.Module:
    """A pipeline chunk of a real model's parameters, with these layers (from 0); one rank holds all of it."""
    family, share = family_of(architecture), Share(0, 1)

    def held(mappings: Iterable[Mapping]) -> dict[str, nn.Parameter]:
        rows = architecture.vocab_size
        return {m.megatron: _weight(*m.local_shape(architecture, share, rows)) for m in mappings}

    ends = [family.embedding] if first else []
    if last:  # of tied embeddings it has a copy
        ends += [*family.final, family.output_layer]
    chunk = _holding(held(ends))
    stacked = nn.ModuleList()
    for layer in layers:
        parameters = held(family.layer_mappings(architecture))
        named = {name.removeprefix("decoder.layers.{layer}."): weight for name, weight in parameters.items()}
        stacked.append(_holding(named))
        stacked[-1].layer_number = layer + 1
    if not hasattr(chunk, "decoder"):
        chunk.decoder = _Holder()
    chunk.decoder.layers = stacked
    return chunk


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "stages",
    [[[[0, 1, 2, 3]]], [[[0, 1]], [[2, 3]]], [[[0]], [[1, 2, 3]]], [[[0], [2]], [[1], [3]]]],
    ids=["one", "two", "uneven", "interleaved"],
)
def test_what_stages_write_covers_every_tensor_once(stages: list[list[list[int]]], tied: bool) -> None:
    architecture = dataclasses.replace(ARCHITECTURE, tie_word_embeddings=tied, qkv_bias=True)
    last = max(layer for chunks in stages for layers in chunks for layer in layers)
    written = {
        name: np.zeros(shape, int)
        for name, shape in family_of(architecture).stored_shapes(architecture).items()
    }
    for chunks in stages:
        held = [_chunk(architecture, layers, first=0 in layers, last=last in layers) for layers in chunks]
        for placed in placement.place(held, architecture):
            for piece in placed.pieces:
                area = tuple(slice(*bounds) for bounds in piece.stored)
                written[piece.tensor][area] += placed.is_writer
    assert all((times == 1).all() for times in written.values())


def test_norms_inside_transformer_engines_layers_are_found() -> None:
    chunk = _stage(
        2,
        self_attention=_Holder(linear_qkv=_Holder(layer_norm_weight=_weight(8))),
        mlp=_Holder(linear_fc1=_Holder(layer_norm_weight=_weight(8))),
    )
    assert [placed.pieces[0].tensor for placed in placement.place([chunk], ARCHITECTURE)] == [
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    ]


def test_wrappers_do_not_matter() -> None:
    chunk = _Holder(decoder=_Holder(final_layernorm=_Holder(weight=_weight(8))))
    wrapped = _Holder(module=_Holder(module=chunk))
    (placed,) = placement.place([wrapped], ARCHITECTURE)
    assert placed.parameter is chunk.decoder.final_layernorm.weight  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("chunk", "named"),
    [
        (_Holder(extra=_Holder(weight=_weight(3))), "extra.weight"),
        (_stage(1, mlp=_Holder(linear_fc2=_Holder(bias=_weight(8)))), "linear_fc2.bias"),
        (_Holder(decoder=_Holder(final_layernorm=_Holder(weight=_weight(9)))), r"\[9\] instead of \[8\]"),
        (_Holder(output_layer=_Holder(weight=_weight(10, 8))), "output_layer.weight"),  # 11 tokens
    ],
)
def test_a_parameter_that_has_no_place_is_refused(chunk: nn.Module, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        placement.place([chunk], ARCHITECTURE)


def test_the_last_stages_copy_of_a_tied_embedding_is_filled_and_not_written() -> None:
    tied = Architecture(**{**vars(ARCHITECTURE), "tie_word_embeddings": True})
    (placed,) = placement.place([_Holder(output_layer=_Holder(weight=_weight(12, 8)))], tied)
    assert placed.pieces == (Piece("model.embed_tokens.weight", ((0, 11), (0, 8)), ((0, 11), (0, 8))),)
    assert not placed.is_writer


def test_blocks_cover_a_piece_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "BLOCK_BYTES", 3 * 5 * 2)  # three rows of five numbers of two bytes
    piece = Piece("x", ((10, 18), (5, 10)), ((0, 8), (0, 5)))
    blocks = placement.row_blocks(piece, 2)
    assert [block.stored for block in blocks] == [
        ((10, 13), (5, 10)),
        ((13, 16), (5, 10)),
        ((16, 18), (5, 10)),
    ]
    assert [block.local[0] for block in blocks] == [(0, 3), (3, 6), (6, 8)]


def test_a_row_larger_than_a_block_is_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "BLOCK_BYTES", 1)
    assert len(placement.row_blocks(Piece("x", ((0, 2), (0, 9)), ((0, 2), (0, 9))), 4)) == 2
    assert len(placement.row_blocks(Piece("x", ((0, 3),), ((4, 7),)), 4)) == 3


@pytest.mark.parametrize("stored", ["F32", "BF16", "F16"])
def test_bits_survive_the_way_there_and_back_nan_included(stored: str) -> None:
    values = torch.tensor([[0.0, -0.0, 1.5], [float("nan"), float("inf"), -3.0]])
    tensor = values.to(placement.TORCH_DTYPES[stored])
    bits = placement.tensor_to_bits(tensor[:, 1:])
    again = placement.bits_to_tensor(bits, stored)
    np.testing.assert_array_equal(placement.tensor_to_bits(again), bits)
    assert again.dtype == tensor.dtype


def test_every_family_has_another_name_and_other_architectures() -> None:
    entries = [entry for family in families() for entry in (family.name, *family.architectures)]
    assert len(entries) == len(set(entries))
