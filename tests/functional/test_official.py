"""From the official code's files to ours and back: commands as a user types them, no sampler needed."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from nemo_spin.data.columns import GENERATED
from nemo_spin.data.files import read_manifest
from nemo_spin.data.pairs import iter_shards
from tests.functional.commands import nemo_spin, write_config
from tests.unit.data.test_official import write_losers


def test_there_and_back(tiny_model: Path, tmp_path: Path) -> None:
    write_losers(tmp_path / "iter0")
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tiny_model)},
        "data": {
            "train": str(tmp_path / "iter0"),
            "heldout": str(tmp_path / "iter0"),
            "format": "spin",
            "use_generations": True,
            "num_workers": 1,
        },
        "generation": {"python": "/nowhere"},
    }
    config = write_config(tmp_path / "official.yaml", values)
    for arguments in (["prepare"], ["generate", "--iteration", "0"]):
        result = nemo_spin(*arguments, "--config", str(config))
        assert result.returncode == 0, result.stderr
    generated = tmp_path / "run" / "iter_00" / "generated"
    (rows,) = iter_shards(generated, "train", schema=GENERATED)
    assert rows.num_rows == 22 and set(rows["num_sampler_tokens"].to_pylist()) == {0}
    manifest = read_manifest(generated)
    assert manifest is not None and manifest.counts["train"]["empty_share"] == 1 / 22
    result = nemo_spin("prepare", "--config", str(config), "--to", "spin-parquet")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "run" / "spin-parquet" / "iter0"
    assert result.stdout.splitlines()[-1] == str(folder)
    again = pq.read_table(folder / "train_prefs-00000-of-00001.parquet").to_pylist()
    assert [row["real"][1]["content"] for row in again] == [f"It is {n}" for n in range(22)]
    assert [row["generated"][1]["content"] for row in again[-2:]] == ["one", ""]
    assert again[0]["generated"][0] == {"role": "user", "content": "Say 0"}
    assert pq.read_metadata(folder / "test_prefs-00000-of-00001.parquet").num_rows == 1
