"""What a family's table consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Mapping as Values
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_spin.bridge.hf_rope import read_rope
from nemo_spin.bridge.mappings import Mapping, Shape, VocabularyParallel
from nemo_spin.megatron.architecture import Architecture


def read_one_rope(values: Values[str, Any], architecture: Architecture) -> Values[str, Any]:
    """What most families say beyond what all say: their rotary embedding."""
    rope = read_rope(
        values, max_positions=architecture.max_position_embeddings, head_dim=architecture.head_dim
    )
    return {"rope": rope}


@dataclass(frozen=True)
class Family:
    """One family of models: how its configuration reads and where its weights go.

    Attributes:
        name: Its name in messages and in `Architecture.family`.
        architectures: Entries of `architectures` in config.json that it answers to.
        embedding, layer, final: Mappings before, in (`{layer}`) and after the layers, in
            the order in which tensors are exported.
        output_layer: Mapping of the output layer where it is not the embedding.
        positions: Mappings of learned positions.
        optional: Flags of `Architecture` -> mappings in each layer of models that have them.
        defaults: Values of configuration keys that config.json may leave out, as the
            family's configuration class has them.
        keys: This file's spelling of a configuration key (Llama's) -> the family's own.
        allowed: More keys, with the only values that can be expressed.
        activations: Values of `hidden_act` that the family has.
        mlp_multiple: Width of the MLP in hidden sizes, where config.json may leave it out.
        fixed: Attributes of `Architecture` that are the same for all models of the family.
        read: Further attributes, from config.json's values and the architecture without them.
        optional_prefix: Start of stored names that some checkpoints leave out.
        ignored_tensors: Endings of stored names that hold no weights (old buffers).
    """

    name: str
    architectures: tuple[str, ...]
    embedding: VocabularyParallel
    layer: tuple[Mapping, ...]
    final: tuple[Mapping, ...]
    output_layer: VocabularyParallel
    positions: tuple[Mapping, ...] = ()
    optional: Values[str, tuple[Mapping, ...]] = field(default_factory=dict)
    defaults: Values[str, Any] = field(default_factory=dict)
    keys: Values[str, str] = field(default_factory=dict)
    allowed: Values[str, tuple[Any, ...]] = field(default_factory=dict)
    activations: tuple[str, ...] = ("silu", "swish")
    mlp_multiple: int | None = None
    fixed: Values[str, Any] = field(default_factory=dict)
    read: Callable[[Values[str, Any], Architecture], Values[str, Any]] = read_one_rope
    optional_prefix: str = ""
    ignored_tensors: tuple[str, ...] = (".rotary_emb.inv_freq",)

    def layer_mappings(self, architecture: Architecture) -> tuple[Mapping, ...]:
        """Those in each layer of this model."""
        optional = (rows for flag, rows in self.optional.items() if getattr(architecture, flag))
        return (*self.layer, *(mapping for rows in optional for mapping in rows))

    def mappings(self, architecture: Architecture) -> Iterator[Mapping]:
        """All mappings of the whole model, in the order of export."""
        yield self.embedding
        yield from self.positions
        in_layer = self.layer_mappings(architecture)
        for layer in range(architecture.num_layers):
            for row in in_layer:
                mapping = row.at_layer(layer)
                if mapping.is_of_experts:
                    yield from map(mapping.at_expert, range(architecture.num_experts))
                else:
                    yield mapping
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

    def parameter(
        self, name: str, layer: int | None, architecture: Architecture, *, expert: int | None = None
    ) -> Mapping | None:
        """The mapping of a Megatron parameter.

        Args:
            name: Its canonical name, with `{layer}` and `{expert}` for the numbers of these.
            layer: Number of its layer in the whole model; None outside the layers.
            architecture: The model.
            expert: Number of its expert in the whole layer; None outside of experts.
        """
        if layer is not None:
            in_layer = self.layer_mappings(architecture)
            found = next((m.at_layer(layer) for m in in_layer if m.megatron == name), None)
            return found if found is None or expert is None else found.at_expert(expert)
        if name == self.output_layer.megatron and architecture.tie_word_embeddings:
            return replace(self.embedding, megatron=name)  # the last stage's copy
        outside = (self.embedding, *self.positions, *self.final, self.output_layer)
        return next((mapping for mapping in outside if mapping.megatron == name), None)
