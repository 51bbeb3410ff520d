"""Rules about how layers are spread over pipeline stages, with Megatron's keys for uneven ones."""

from __future__ import annotations

from nemo_spin.config.mistakes import Mistake, mistake
from nemo_spin.config.schema import Config, ModelConfig

_STAGES = "model.pipeline_model_parallel_size"
_CHUNKS = "model.virtual_pipeline_model_parallel_size"
_FIRST = "model.num_layers_in_first_pipeline_stage"
_LAST = "model.num_layers_in_last_pipeline_stage"
_EMBEDDING = "model.account_for_embedding_in_pipeline_split"
_LOSS = "model.account_for_loss_in_pipeline_split"
PIPELINE_KEYS = (_STAGES, _CHUNKS, _FIRST, _LAST, _EMBEDDING, _LOSS)


def layers_of_stages(model: ModelConfig, num_layers: int) -> tuple[int, ...] | None:
    """Layers of each pipeline stage; None where they do not fit (`layers_of_chunks`)."""
    chunks = layers_of_chunks(model, num_layers)
    return None if chunks is None else tuple(map(sum, chunks))


def layers_of_chunks(model: ModelConfig, num_layers: int) -> list[list[int]] | None:
    """Layers of each interleaved chunk of each stage, as Megatron spreads them; None where they do not fit.

    Stages whose number of layers is given have it, the others equal numbers of the rest. An
    embedding or a head that is accounted for takes the place of a layer. Every stage's places
    are divided evenly over its interleaved chunks.
    """
    stages, chunks = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size or 1
    first, last = model.num_layers_in_first_pipeline_stage, model.num_layers_in_last_pipeline_stage
    embedding, loss = model.account_for_embedding_in_pipeline_split, model.account_for_loss_in_pipeline_split
    given = [number for number in (first, last) if number is not None]
    rest, others = num_layers + embedding + loss - sum(given), stages - len(given)
    each, unplaced = divmod(rest, others) if others > 0 else (0, rest)
    places = [each] * stages
    if first is not None:
        places[0] = first
    if last is not None:
        places[-1] = last
    if others < 0 or unplaced or any(number < 1 or number % chunks for number in places):
        return None
    layers = [[number // chunks] * chunks for number in places]
    layers[0][0] -= embedding
    layers[-1][-1] -= loss
    return layers if layers[0][0] >= 0 and layers[-1][-1] >= 0 else None


def interleaving_needs_a_pipeline(config: Config) -> list[Mistake]:
    """Several chunks of layers are passed through several stages."""
    model = config.model
    if model.virtual_pipeline_model_parallel_size is None or model.pipeline_model_parallel_size > 1:
        return []
    return [
        mistake(
            _CHUNKS,
            found=f"{model.virtual_pipeline_model_parallel_size} with {_STAGES} 1",
            rule="an interleaved schedule passes several chunks of layers through several stages",
            remedy=f"set it to null, or {_STAGES} to at least 2",
            also=(_STAGES,),
        )
    ]


def uneven_stages_are_meant(config: Config) -> list[Mistake]:
    """Uneven stages need several of them, and one way of saying how uneven they are."""
    model = config.model
    numbers = {
        _FIRST: model.num_layers_in_first_pipeline_stage,
        _LAST: model.num_layers_in_last_pipeline_stage,
    }
    places = {
        _EMBEDDING: model.account_for_embedding_in_pipeline_split,
        _LOSS: model.account_for_loss_in_pipeline_split,
    }
    given = {key: number for key, number in numbers.items() if number is not None}
    counted = {key: True for key, is_counted in places.items() if is_counted}
    if model.pipeline_model_parallel_size == 1:
        return [
            mistake(
                key,
                found=f"{str(value).lower()}, with {_STAGES} 1",
                rule="a single stage has all layers, the embedding and the head",
                remedy=f"leave it out, or set {_STAGES} to at least 2",
                also=(_STAGES,),
            )
            for key, value in (given | counted).items()
        ]
    chunks = model.virtual_pipeline_model_parallel_size or 1
    mistakes = [
        mistake(
            key,
            found=f"{number}, with {_CHUNKS} {chunks}",
            rule="a stage's layers are divided evenly over its interleaved chunks",
            remedy=f"set it to a multiple of {chunks}, or {_CHUNKS} to null",
            also=(_CHUNKS,),
        )
        for key, number in given.items()
        if number % chunks
    ]
    if given and counted:
        keys = (*given, *counted)
        mistakes.append(
            mistake(
                keys[0],
                found=f"given beside {', '.join(counted)}",
                rule="either numbers of layers are given, or the embedding and the head count as layers",
                remedy="keep one of the two ways",
                also=keys[1:],
            )
        )
    return mistakes


def layers_fit(config: Config, num_layers: int) -> list[Mistake]:
    """Whether a model of `num_layers` can be spread over the stages as configured."""
    model = config.model
    if layers_of_stages(model, num_layers) is not None:
        return []
    stages, chunks = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size or 1
    given = {
        _FIRST: model.num_layers_in_first_pipeline_stage,
        _LAST: model.num_layers_in_last_pipeline_stage,
        _EMBEDDING: model.account_for_embedding_in_pipeline_split or None,
        _LOSS: model.account_for_loss_in_pipeline_split or None,
    }
    named = {key: str(value).lower() for key, value in given.items() if value is not None}
    size = f"{stages} x {_CHUNKS} {chunks}" if chunks > 1 else str(stages)
    found = f"{size} does not divide the model's {num_layers} layers"
    if named:
        settings = ", ".join(f"{key} {value}" for key, value in named.items())
        found = f"{size} cannot have the model's {num_layers} layers with {settings}"
    return [
        mistake(
            _STAGES,
            found=found,
            rule="the layers are split evenly, over stages and their interleaved chunks, but for a first "
            "and last stage whose layers are given and an embedding and head that count as layers",
            remedy=_remedy(stages, chunks, num_layers),
            also=(_CHUNKS, *named),
        )
    ]


def _remedy(stages: int, chunks: int, num_layers: int) -> str:
    sizes = [size for size in range(1, num_layers + 1) if num_layers % (size * chunks) == 0][:12]
    remedy = f"set it to one of {', '.join(map(str, sizes))}" if sizes else f"set {_CHUNKS} to null"
    for first in range(num_layers // stages // chunks * chunks, 0, -chunks):
        others = ModelConfig(
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=chunks,
            num_layers_in_first_pipeline_stage=first,
        )
        if stages > 1 and layers_of_stages(others, num_layers) is not None:
            return f"{remedy}, or {_FIRST} to {first}"
    return remedy
