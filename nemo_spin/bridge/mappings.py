"""How one Megatron parameter is made of Hugging Face tensors: the kinds of it.

A mapping is pure geometry. For one tensor-parallel rank it lists *pieces*: which region
of which stored tensor is which region of the rank's parameter. Import copies along the
pieces, export goes the other way, and the export gate compares along them, so the three
cannot disagree. A kind is right exactly if its inverse is: over all ranks the written
pieces cover every stored tensor once, and the pieces of a rank cover its parameter
once (but for padded vocabulary rows). `tests/unit/bridge/test_mappings.py` shows both.

No torch here. Names may contain `{layer}`, the number of the layer in the whole model, and
`{expert}`, the number of the expert in its layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from nemo_spin.errors import CheckpointError, explain
from nemo_spin.megatron.architecture import Architecture

Shape = tuple[int, ...]
Region = tuple[tuple[int, int], ...]  # (start, stop) of every axis


@dataclass(frozen=True)
class Piece:
    """A region of a stored tensor and the region of the rank's parameter that holds it.

    Where `transposed`, the rows of the stored tensor are the columns of the parameter.
    """

    tensor: str
    stored: Region
    local: Region
    transposed: bool = False


@dataclass(frozen=True)
class Share:
    """One rank's place among the tensor-parallel ranks."""

    tp_rank: int
    tp_size: int


def whole(shape: Shape) -> Region:
    """The region that is all of `shape`."""
    return tuple((0, size) for size in shape)


def _rows(shape: Shape, start: int, stop: int) -> Region:
    return ((start, stop), *whole(shape)[1:])


def _share_of(size: int, share: Share, what: str) -> tuple[int, int]:
    """This rank's range of `size` equal parts.

    Raises:
        CheckpointError: The ranks cannot hold equal parts.
    """
    if size % share.tp_size:
        raise CheckpointError(
            explain(
                "model.tensor_model_parallel_size",
                found=f"{share.tp_size}, but {what} has {size}",
                rule="every tensor-parallel rank holds the same number of them",
                remedy=f"choose a divisor of {size}",
            )
        )
    part = size // share.tp_size
    return share.tp_rank * part, (share.tp_rank + 1) * part


def dimensions(architecture: Architecture, names: tuple[str | int, ...]) -> Shape:
    """The sizes that the tables name: attributes of the architecture, or numbers."""
    return tuple(name if isinstance(name, int) else getattr(architecture, name) for name in names)


@dataclass(frozen=True)
class Mapping:
    """One Megatron parameter, by its name in `GPTModel` with the local layer spec."""

    megatron: str

    @property
    def is_of_experts(self) -> bool:
        """Whether there is one for each expert, whole on the rank that holds the expert."""
        return "{expert}" in self.megatron

    def at_layer(self, layer: int) -> Self:
        """The same mapping with `{layer}` filled in."""
        return self._filled("{layer}", str(layer))

    def at_expert(self, expert: int) -> Self:
        """The same mapping with `{expert}` filled in."""
        return self._filled("{expert}", str(expert))

    def _filled(self, placeholder: str, number: str) -> Self:
        def filled(value: Any) -> Any:
            if isinstance(value, str):
                return value.replace(placeholder, number)
            if isinstance(value, Mapping):
                return value._filled(placeholder, number)
            return tuple(filled(element) for element in value) if isinstance(value, tuple) else value

        return replace(self, **{field.name: filled(getattr(self, field.name)) for field in fields(self)})

    def stored_shapes(self, architecture: Architecture) -> dict[str, Shape]:
        """Names and shapes of the Hugging Face tensors, in the order of export."""
        raise NotImplementedError

    def local_shape(self, architecture: Architecture, share: Share, vocab_rows: int) -> Shape:
        """Shape of the rank's parameter; `vocab_rows` are a rank's vocabulary rows, padding included."""
        raise NotImplementedError

    def pieces(self, architecture: Architecture, share: Share, vocab_rows: int) -> Iterator[Piece]:
        """The rank's pieces, in the order of its parameter's rows."""
        raise NotImplementedError

    def is_writer(self, share: Share) -> bool:
        """Whether this rank's pieces are the ones that are exported."""
        return True


@dataclass(frozen=True)
class Replicated(Mapping):
    """The same on every tensor-parallel rank; the first exports it."""

    hf: str
    shape: tuple[str | int, ...]

    def stored_shapes(self, architecture: Architecture) -> dict[str, Shape]:
        """See `Mapping`."""
        return {self.hf: dimensions(architecture, self.shape)}

    def local_shape(self, architecture: Architecture, share: Share, vocab_rows: int) -> Shape:
        """See `Mapping`."""
        return dimensions(architecture, self.shape)

    def pieces(self, architecture: Architecture, share: Share, vocab_rows: int) -> Iterator[Piece]:
        """See `Mapping`."""
        region = whole(dimensions(architecture, self.shape))
        yield Piece(self.hf, region, region)

    def is_writer(self, share: Share) -> bool:
        """See `Mapping`."""
        return share.tp_rank == 0


@dataclass(frozen=True)
class VocabularyParallel(Mapping):
    """Rows are tokens, split over the ranks after padding; padded rows are stored nowhere."""

    hf: str

    def stored_shapes(self, architecture: Architecture) -> dict[str, Shape]:
        """See `Mapping`."""
        return {self.hf: (architecture.vocab_size, architecture.hidden_size)}

    def local_shape(self, architecture: Architecture, share: Share, vocab_rows: int) -> Shape:
        """See `Mapping`."""
        return (vocab_rows, architecture.hidden_size)

    def pieces(self, architecture: Architecture, share: Share, vocab_rows: int) -> Iterator[Piece]:
        """See `Mapping`."""
        start = share.tp_rank * vocab_rows
        stop = min(start + vocab_rows, architecture.vocab_size)
        if start < stop:
            columns = (0, architecture.hidden_size)
            yield Piece(self.hf, ((start, stop), columns), ((0, stop - start), columns))


@dataclass(frozen=True)
class ColumnParallel(Mapping):
    """Rows (output channels) are split; a rank holds its part of each tensor, one below the other.

    One tensor is Megatron's plain column-parallel layer, two (gate, up) its gated MLP.
    """

    hf: tuple[str, ...]
    shape: tuple[str, ...]

    def stored_shapes(self, architecture: Architecture) -> dict[str, Shape]:
        """See `Mapping`."""
        return {name: dimensions(architecture, self.shape) for name in self.hf}

    def local_shape(self, architecture: Architecture, share: Share, vocab_rows: int) -> Shape:
        """See `Mapping`."""
        rows, *rest = dimensions(architecture, self.shape)
        start, stop = _share_of(rows, share, self.shape[0])
        return (len(self.hf) * (stop - start), *rest)

    def pieces(self, architecture: Architecture, share: Share, vocab_rows: int) -> Iterator[Piece]:
        """See `Mapping`."""
        shape = dimensions(architecture, self.shape)
        start, stop = _share_of(shape[0], share, self.shape[0])
        for position, name in enumerate(self.hf):
            first = position * (stop - start)
            yield Piece(name, _rows(shape, start, stop), _rows(shape, first, first + stop - start))


@dataclass(frozen=True)
class FusedColumnParallel(Mapping):
    """One stored tensor of several parts of equal size (gate, up), each of them column-parallel.

    The parts lie one below the other as stored, and so do a rank's shares of them.
    """

    hf: str
    parts: int
    shape: tuple[str, ...]  # of one part

    def _columns(self) -> ColumnParallel:
        """The same with parts that are tensors of their own, named by number."""
        return ColumnParallel(self.megatron, tuple(str(part) for part in range(self.parts)), self.shape)

    def stored_shapes(self, architecture: Architecture) -> dict[str, Shape]:
        """See `Mapping`."""
        rows, *rest = dimensions(architecture, self.shape)
        return {self.hf: (self.parts * rows, *rest)}

    def local_shape(self, architecture: Architecture, share: Share, vocab_rows: int) -> Shape:
        """See `Mapping`."""
        return self._columns().local_shape(architecture, share, vocab_rows)

    def pieces(self, architecture: Architecture, share: Share, vocab_rows: int) -> Iterator[Piece]:
        """See `Mapping`."""
        rows = dimensions(architecture, self.shape)[0]
        for piece in self._columns().pieces(architecture, share, vocab_rows):
            yield _lowered(piece, self.hf, int(piece.tensor) * rows)


@dataclass(frozen=True)
class RowParallel(Mapping):
    """Columns (input channels) are split."""

    hf: str
    shape: tuple[str, str]

    def stored_shapes(self, architecture: Architecture) -> dict[str, Shape]:
        """See `Mapping`."""
        return {self.hf: dimensions(architecture, self.shape)}

    def local_shape(self, architecture: Architecture, share: Share, vocab_rows: int) -> Shape:
        """See `Mapping`."""
        rows, columns = dimensions(architecture, self.shape)
        start, stop = _share_of(columns, share, self.shape[1])
        return (rows, stop - start)

    def pieces(self, architecture: Architecture, share: Share, vocab_rows: int) -> Iterator[Piece]:
        """See `Mapping`."""
        rows, columns = dimensions(architecture, self.shape)
        start, stop = _share_of(columns, share, self.shape[1])
        yield Piece(self.hf, ((0, rows), (start, stop)), ((0, rows), (0, stop - start)))


@dataclass(frozen=True)
class QueryKeyValue(Mapping):
    """Query, key and value rows interleaved by query group; groups are split over the ranks.

    The rows of one group: its query heads, its key head, its value head.
    """

    query: str
    key: str
    value: str
    columns: tuple[str, ...] = ()  # none: a bias

    def stored_shapes(self, architecture: Architecture) -> dict[str, Shape]:
        """See `Mapping`."""
        columns = dimensions(architecture, self.columns)
        key_value_size = architecture.num_query_groups * architecture.head_dim
        return {
            self.query: (architecture.num_attention_heads * architecture.head_dim, *columns),
            self.key: (key_value_size, *columns),
            self.value: (key_value_size, *columns),
        }

    def local_shape(self, architecture: Architecture, share: Share, vocab_rows: int) -> Shape:
        """See `Mapping`."""
        start, stop = _share_of(architecture.num_query_groups, share, "the model's key/value heads")
        heads = architecture.num_attention_heads // architecture.num_query_groups + 2
        return ((stop - start) * heads * architecture.head_dim, *dimensions(architecture, self.columns))

    def pieces(self, architecture: Architecture, share: Share, vocab_rows: int) -> Iterator[Piece]:
        """See `Mapping`."""
        shapes = self.stored_shapes(architecture)
        head_dim = architecture.head_dim
        query_rows = architecture.num_attention_heads // architecture.num_query_groups * head_dim
        local = 0
        for group in range(*_share_of(architecture.num_query_groups, share, "the model's key/value heads")):
            for name, rows in ((self.query, query_rows), (self.key, head_dim), (self.value, head_dim)):
                stored = _rows(shapes[name], group * rows, (group + 1) * rows)
                yield Piece(name, stored, ((local, local + rows), *stored[1:]))
                local += rows


@dataclass(frozen=True)
class FusedQueryKeyValue(Mapping):
    """One stored tensor: all query heads, then all key heads, then all value heads."""

    hf: str
    columns: tuple[str, ...] = ()  # none: a bias

    def _apart(self) -> QueryKeyValue:
        """The same with query, key and value as tensors of their own."""
        return QueryKeyValue(self.megatron, "query", "key", "value", self.columns)

    def stored_shapes(self, architecture: Architecture) -> dict[str, Shape]:
        """See `Mapping`."""
        shapes = self._apart().stored_shapes(architecture).values()
        return {self.hf: (sum(rows for rows, *_ in shapes), *dimensions(architecture, self.columns))}

    def local_shape(self, architecture: Architecture, share: Share, vocab_rows: int) -> Shape:
        """See `Mapping`."""
        return self._apart().local_shape(architecture, share, vocab_rows)

    def pieces(self, architecture: Architecture, share: Share, vocab_rows: int) -> Iterator[Piece]:
        """See `Mapping`."""
        query_size, key_size = architecture.query_size, architecture.key_size
        first = {"query": 0, "key": query_size, "value": query_size + key_size}
        for piece in self._apart().pieces(architecture, share, vocab_rows):
            yield _lowered(piece, self.hf, first[piece.tensor])


def _lowered(piece: Piece, tensor: str, rows: int) -> Piece:
    """The piece, `rows` further down in another tensor."""
    (start, stop), *columns = piece.stored
    return replace(piece, tensor=tensor, stored=((start + rows, stop + rows), *columns))


@dataclass(frozen=True)
class Transposed(Mapping):
    """A matrix that is stored as its transpose, [input, output] (`Conv1D` of transformers)."""

    inner: Mapping

    def stored_shapes(self, architecture: Architecture) -> dict[str, Shape]:
        """See `Mapping`."""
        return {name: shape[::-1] for name, shape in self.inner.stored_shapes(architecture).items()}

    def local_shape(self, architecture: Architecture, share: Share, vocab_rows: int) -> Shape:
        """See `Mapping`."""
        return self.inner.local_shape(architecture, share, vocab_rows)

    def pieces(self, architecture: Architecture, share: Share, vocab_rows: int) -> Iterator[Piece]:
        """See `Mapping`."""
        for piece in self.inner.pieces(architecture, share, vocab_rows):
            yield replace(piece, stored=piece.stored[::-1], transposed=True)

    def is_writer(self, share: Share) -> bool:
        """See `Mapping`."""
        return self.inner.is_writer(share)


def transposed(inner: Mapping) -> Transposed:
    """`inner`, stored as its transpose."""
    return Transposed(inner.megatron, inner)
