"""Every mapping kind alone: worked out by hand, and proven by its inverse at every tensor-parallel size."""

import numpy as np
import pytest

from nemo_spin.bridge.mappings import (
    ColumnParallel,
    FusedColumnParallel,
    FusedQueryKeyValue,
    Mapping,
    QueryKeyValue,
    Region,
    Replicated,
    RowParallel,
    Share,
    VocabularyParallel,
    transposed,
)
from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture

ARCHITECTURE = Architecture(
    family="llama",
    hf_architecture="LlamaForCausalLM",
    num_layers=1,
    hidden_size=6,
    ffn_hidden_size=8,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=2,
    vocab_size=11,
    max_position_embeddings=16,
    norm_epsilon=1e-6,
    num_experts=3,
    expert_ffn_hidden_size=5,
)
EXPERTS = [  # whole on the rank that holds them: only their width is of a size of their own
    ColumnParallel(
        "experts.{expert}.fc1",
        ("hf.{expert}.gate", "hf.{expert}.up"),
        ("expert_ffn_hidden_size", "hidden_size"),
    ),
    RowParallel("experts.{expert}.fc2", "hf.{expert}.down", ("hidden_size", "expert_ffn_hidden_size")),
]
KINDS = [
    Replicated("norm", "hf.norm", ("hidden_size",)),
    VocabularyParallel("embedding", "hf.embedding"),
    ColumnParallel("fc", ("hf.fc",), ("ffn_hidden_size", "hidden_size")),
    ColumnParallel("fc.bias", ("hf.fc.bias",), ("ffn_hidden_size",)),
    ColumnParallel("fc1", ("hf.gate", "hf.up"), ("ffn_hidden_size", "hidden_size")),
    ColumnParallel("fc1.bias", ("hf.gate.bias", "hf.up.bias"), ("ffn_hidden_size",)),
    RowParallel("proj", "hf.proj", ("hidden_size", "query_size")),
    QueryKeyValue("qkv", "hf.q", "hf.k", "hf.v", ("hidden_size",)),
    QueryKeyValue("qkv.bias", "hf.q.bias", "hf.k.bias", "hf.v.bias"),
    FusedColumnParallel("gate_up", "hf.gate_up", 2, ("ffn_hidden_size", "hidden_size")),
    FusedQueryKeyValue("fused_qkv", "hf.qkv", ("hidden_size",)),
    FusedQueryKeyValue("fused_qkv.bias", "hf.qkv.bias"),
    ColumnParallel("heads", ("hf.heads",), ("query_key_value_size", "hidden_size")),
    ColumnParallel("query_norm", ("hf.query_norm",), ("query_size",)),
    transposed(FusedQueryKeyValue("conv_qkv", "hf.conv_qkv", ("hidden_size",))),
    transposed(ColumnParallel("conv_fc", ("hf.conv_fc",), ("ffn_hidden_size", "hidden_size"))),
    transposed(RowParallel("conv_proj", "hf.conv_proj", ("hidden_size", "query_size"))),
]


def _vocab_rows(tp_size: int) -> int:
    return -(-ARCHITECTURE.vocab_size // tp_size)


def _index(region: Region) -> tuple[slice, ...]:
    return tuple(slice(*bounds) for bounds in region)


def _stored(mapping: Mapping) -> dict[str, np.ndarray]:
    """Tensors whose every value is another, and none is 0."""
    tensors, first = {}, 1
    for name, shape in mapping.stored_shapes(ARCHITECTURE).items():
        tensors[name] = np.arange(first, first + np.prod(shape)).reshape(shape)
        first += tensors[name].size
    return tensors


def _parameter(mapping: Mapping, stored: dict[str, np.ndarray], share: Share) -> np.ndarray:
    rows = _vocab_rows(share.tp_size)
    parameter = np.zeros(mapping.local_shape(ARCHITECTURE, share, rows), dtype=np.int64)
    for piece in mapping.pieces(ARCHITECTURE, share, rows):
        assert (parameter[_index(piece.local)] == 0).all(), "a piece lies over another"
        values = stored[piece.tensor][_index(piece.stored)]
        parameter[_index(piece.local)] = values.T if piece.transposed else values
    return parameter


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("mapping", KINDS, ids=lambda mapping: mapping.megatron)
def test_what_is_written_back_is_what_was_read(mapping: Mapping, tp_size: int) -> None:
    stored = _stored(mapping)
    written = {name: np.zeros_like(values) for name, values in stored.items()}
    for tp_rank in range(tp_size):
        share = Share(tp_rank, tp_size)
        parameter = _parameter(mapping, stored, share)
        if not mapping.is_writer(share):
            continue
        for piece in mapping.pieces(ARCHITECTURE, share, _vocab_rows(tp_size)):
            target = written[piece.tensor][_index(piece.stored)]
            assert (target == 0).all(), "two ranks write the same values"
            values = parameter[_index(piece.local)]
            target[...] = values.T if piece.transposed else values
    for name, values in stored.items():
        np.testing.assert_array_equal(written[name], values)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("mapping", KINDS, ids=lambda mapping: mapping.megatron)
def test_every_value_of_a_parameter_is_stored_but_for_padded_rows(mapping: Mapping, tp_size: int) -> None:
    zeros = sum(
        int((_parameter(mapping, _stored(mapping), Share(tp_rank, tp_size)) == 0).sum())
        for tp_rank in range(tp_size)
    )
    padded_rows = _vocab_rows(tp_size) * tp_size - ARCHITECTURE.vocab_size
    is_vocabulary = isinstance(mapping, VocabularyParallel)
    assert zeros == (padded_rows * ARCHITECTURE.hidden_size if is_vocabulary else 0)


@pytest.mark.parametrize("mapping", EXPERTS, ids=lambda mapping: mapping.megatron)
def test_an_expert_is_whole_where_it_is(mapping: Mapping) -> None:
    assert mapping.is_of_experts
    third = mapping.at_layer(0).at_expert(2)
    stored = _stored(third)
    assert all(name.startswith("hf.2.") for name in stored)
    parameter = _parameter(third, stored, Share(0, 1))
    assert (np.sort(parameter.ravel()) == np.arange(1, 1 + parameter.size)).all()
    for piece in third.pieces(ARCHITECTURE, Share(0, 1), 0):
        np.testing.assert_array_equal(
            parameter[_index(piece.local)], stored[piece.tensor][_index(piece.stored)]
        )


def test_query_key_value_rows_alternate_by_group() -> None:
    # 8 query heads in 4 groups of head size 2; the second of two ranks holds groups 2 and 3.
    mapping = QueryKeyValue("qkv.bias", "q", "k", "v")
    stored = {"q": np.arange(16), "k": np.arange(100, 108), "v": np.arange(200, 208)}
    expected = [8, 9, 10, 11, 104, 105, 204, 205, 12, 13, 14, 15, 106, 107, 206, 207]
    parameter = np.zeros(16, dtype=np.int64)
    for piece in mapping.pieces(ARCHITECTURE, Share(1, 2), 0):
        parameter[_index(piece.local)] = stored[piece.tensor][_index(piece.stored)]
    assert parameter.tolist() == expected


def test_a_gated_mlp_holds_gate_above_up_in_every_rank() -> None:
    mapping = ColumnParallel("fc1", ("gate", "up"), ("ffn_hidden_size",))
    stored = {"gate": np.arange(8), "up": np.arange(100, 108)}
    parameter = np.zeros(4, dtype=np.int64)
    for piece in mapping.pieces(ARCHITECTURE, Share(3, 4), 0):
        parameter[_index(piece.local)] = stored[piece.tensor][_index(piece.stored)]
    assert parameter.tolist() == [6, 7, 106, 107]


def test_gate_and_up_in_one_tensor_are_what_they_are_apart() -> None:
    mapping = FusedColumnParallel("fc1", "gate_up", 2, ("ffn_hidden_size",))
    stored = {"gate_up": np.concatenate([np.arange(8), np.arange(100, 108)])}
    assert _parameter(mapping, stored, Share(3, 4)).tolist() == [6, 7, 106, 107]


def test_query_key_and_value_in_one_tensor_are_what_they_are_apart() -> None:
    apart = QueryKeyValue("qkv", "q", "k", "v", ("hidden_size",))
    fused = FusedQueryKeyValue("qkv", "qkv", ("hidden_size",))
    stored = _stored(apart)
    joined = {"qkv": np.concatenate([stored["q"], stored["k"], stored["v"]])}
    for tp_rank in range(2):
        share = Share(tp_rank, 2)
        np.testing.assert_array_equal(_parameter(fused, joined, share), _parameter(apart, stored, share))


def test_a_transposed_matrix_is_read_column_by_column() -> None:
    mapping = transposed(ColumnParallel("fc", ("fc",), ("ffn_hidden_size", "hidden_size")))
    stored = {"fc": np.arange(48).reshape(6, 8)}  # [input, output]
    expected = [[column + 8 * row for row in range(6)] for column in (2, 3)]
    assert _parameter(mapping, stored, Share(1, 4)).tolist() == expected
    assert transposed(KINDS[0]).is_writer(Share(1, 2)) is False


def test_a_rank_that_holds_padding_alone_has_no_pieces() -> None:
    # 11 tokens padded to 4 x 4 rows for a kernel's sake: the last rank has rows 12 to 15.
    mapping = VocabularyParallel("embedding", "hf.embedding")
    assert list(mapping.pieces(ARCHITECTURE, Share(3, 4), 4)) == []


def test_layers_are_numbered_in_all_names() -> None:
    mapping = ColumnParallel("decoder.{layer}.fc1", ("m.{layer}.gate", "m.{layer}.up"), ("hidden_size",))
    filled = mapping.at_layer(17)
    assert (filled.megatron, filled.hf) == ("decoder.17.fc1", ("m.17.gate", "m.17.up"))
    assert filled.shape == ("hidden_size",)
    inner = FusedColumnParallel("{layer}.fc1", "{layer}.gate_up", 2, ("hidden_size", "hidden_size"))
    assert transposed(inner).at_layer(3).stored_shapes(ARCHITECTURE) == {"3.gate_up": (6, 12)}


@pytest.mark.parametrize(
    ("mapping", "named"),
    [
        (KINDS[2], "ffn_hidden_size has 8"),
        (KINDS[6], "query_size has 16"),
        (KINDS[7], "key/value heads has 4"),
    ],
    ids=["column", "row", "qkv"],
)
def test_a_size_that_ranks_cannot_share_is_refused_by_name(mapping: Mapping, named: str) -> None:
    with pytest.raises(CheckpointError, match="tensor_model_parallel_size") as caught:
        list(mapping.pieces(ARCHITECTURE, Share(0, 3), 0))
    assert named in str(caught.value)
