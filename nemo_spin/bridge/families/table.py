"""What a family's table consists of."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping as Values
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_spin.bridge.mappings import Mapping, Shape, VocabularyParallel
from nemo_spin.megatron.architecture import Architecture


@dataclass(frozen=True)
class Family:
    """One family of models: how its configuration reads and where its weights go.

    Attributes:
        name: Its name in messages and in `Architecture.family`.
        architectures: Entries of `architectures` in config.json that it answers to.
        embedding, layer, final: Mappings before, in (`{layer}`) and after the layers, in
            the order in which tensors are exported.
        output_layer: Mapping of the output layer where it is not the embedding.
        defaults: Values of configuration keys that config.json may leave out, as the
            family's configuration class has them.
        qkv_bias, qk_norm: See `Architecture`.
        ignored_tensors: Endings of stored names that hold no weights (old buffers).
    """

    name: str
    architectures: tuple[str, ...]
    embedding: VocabularyParallel
    layer: tuple[Mapping, ...]
    final: tuple[Mapping, ...]
    output_layer: VocabularyParallel
    defaults: Values[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    qk_norm: bool = False
    ignored_tensors: tuple[str, ...] = (".rotary_emb.inv_freq",)

    def mappings(self, architecture: Architecture) -> Iterator[Mapping]:
        """All mappings of the whole model, in the order of export."""
        yield self.embedding
        for layer in range(architecture.num_layers):
            for mapping in self.layer:
                yield mapping.at_layer(layer)
        yield from self.final
        if not architecture.tie_word_embeddings:
            yield self.output_layer

    def stored_shapes(self, architecture: Architecture) -> dict[str, Shape]:
        """Name and shape of every tensor that a checkpoint must have, in the order of export."""
        return {
            name: shape
            for mapping in self.mappings(architecture)
            for name, shape in mapping.stored_shapes(architecture).items()
        }

    def may_be_stored(self, name: str, architecture: Architecture) -> bool:
        """Whether a tensor that is not in the table may be in a checkpoint, without effect."""
        tied = architecture.tie_word_embeddings and name == self.output_layer.hf
        return tied or name.endswith(self.ignored_tensors)

    def parameter(self, name: str, layer: int | None, architecture: Architecture) -> Mapping | None:
        """The mapping of a Megatron parameter.

        Args:
            name: Its canonical name, with `{layer}` for the number of its layer.
            layer: Number of its layer in the whole model; None outside the layers.
        """
        if layer is not None:
            return next((m.at_layer(layer) for m in self.layer if m.megatron == name), None)
        if name == self.output_layer.megatron and architecture.tie_word_embeddings:
            return replace(self.embedding, megatron=name)  # the last stage's copy
        outside = (self.embedding, *self.final, self.output_layer)
        return next((mapping for mapping in outside if mapping.megatron == name), None)
