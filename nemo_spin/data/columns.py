"""The parquet schemas of a run directory. One file knows the columns; all stages use it.

Token ids are list<int32> in files, large_list<int32> where the rows of many files come together: offsets
of 32 bits end at 2^31 tokens. Log-probabilities are float64 sums in nats over the tokens of a response, its
closing EOS included and the prompt excluded.
"""

from __future__ import annotations

import pyarrow as pa

TOKEN_IDS = pa.list_(pa.int32())

PREPARED = pa.schema(
    [
        ("id", pa.string()),  # stable over iterations and over resumes
        ("prompt_ids", TOKEN_IDS),
        ("real_ids", TOKEN_IDS),
        ("prompt_text", pa.string()),  # as the template rendered it, for people and scorers
        ("real_text", pa.string()),
    ]
)

# With the answers that came with the demonstrations (`data.use_generations`).
PREPARED_GIVEN = pa.schema([*PREPARED, ("given_ids", TOKEN_IDS)])

QUARANTINED = pa.schema(
    [("id", pa.string()), ("row", pa.int64()), ("split", pa.string()), ("reason", pa.string())]
)

GENERATED = pa.schema(
    [
        ("id", pa.string()),
        ("sample", pa.int32()),  # 0 ... num_generations - 1
        ("iteration", pa.int32()),
        ("prompt_ids", TOKEN_IDS),
        ("real_ids", TOKEN_IDS),
        ("generated_ids", TOKEN_IDS),  # as sampled, EOS included unless cut
        ("finish_reason", pa.string()),  # stop | length
        ("sampler_logps", pa.float64()),
        ("num_sampler_tokens", pa.int32()),
        ("opponent_sha256", pa.string()),
    ]
)

SCORED = pa.schema(
    [
        *GENERATED,
        ("opponent_real_logps", pa.float64()),
        ("opponent_generated_logps", pa.float64()),
    ]
)


def with_large_lists(rows: pa.Table) -> pa.Table:
    """The rows with 64-bit offsets to their token ids, which are not copied."""
    fields = [
        field.with_type(pa.large_list(field.type.value_type)) if pa.types.is_list(field.type) else field
        for field in rows.schema
    ]
    return rows.cast(pa.schema(fields))


def joined(column: pa.ChunkedArray) -> pa.LargeListArray:
    """A column of token ids in one piece, however many they are."""
    return with_large_lists(pa.table({"": column}))[""].combine_chunks()
