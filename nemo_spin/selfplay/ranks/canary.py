"""Leaves what Megatron says about a few texts, for whoever loads the same weights elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from nemo_spin.bridge.placement import TORCH_DTYPES
from nemo_spin.data.columns import TOKEN_IDS
from nemo_spin.data.datasets import Units
from nemo_spin.generation.canary import Canary, CanaryText, write_canary
from nemo_spin.megatron.engine import Engine
from nemo_spin.megatron.runtime import first_rank_writes
from nemo_spin.selfplay.ranks.context import StageContext

_TEXTS = 8
_RESPONSE_TOKENS = 32


@torch.no_grad()
def round_to_stored(chunks: Sequence[nn.Module], stored_dtype: str) -> None:
    """Rounds weights in place to what an export stores: it is what others will compute with.

    Args:
        chunks: This rank's share.
        stored_dtype: As safetensors spells it.
    """
    dtype = TORCH_DTYPES[stored_dtype]
    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.dtype != dtype:
                parameter.copy_(parameter.to(dtype))


def record_canary(context: StageContext, engine: Engine) -> None:
    """Writes `canary.json` with the engine's weights. All ranks must call.

    The texts are the first demonstrations, which no setting of the sampler can change.
    """
    path = context.run.data_dir / "train.parquet"
    rows = next(
        pq.ParquetFile(path).iter_batches(batch_size=_TEXTS, columns=["id", "prompt_ids", "real_ids"])
    )
    prompts = rows["prompt_ids"].to_pylist()
    # A sampler has room for an answer of generation.max_tokens after the longest prompt, and
    # draws one token itself.
    longest = max(1, min(_RESPONSE_TOKENS, context.config.generation.max_tokens - 1))
    responses = [ids[:longest] for ids in rows["real_ids"].to_pylist()]
    column = pa.array(responses, TOKEN_IDS)
    table = pa.table(
        {**{name: rows[name] for name in ("id", "prompt_ids")}, "real_ids": column, "generated_ids": column}
    )
    logps = engine.score(Units(table), np.arange(table.num_rows))
    texts = tuple(
        CanaryText(prompt, response, logps[row][0])
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    )
    with first_rank_writes(context.runtime) as writes:
        if writes:
            write_canary(context.here.canary_path, Canary(context.agreement, texts))
