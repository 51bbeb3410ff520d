from __future__ import annotations

from pathlib import Path

import pytest

from nemo_spin.data.files import write_json
from nemo_spin.data.progress import SilentProgress
from nemo_spin.errors import ConfigError
from nemo_spin.generation.engine import Answer, Sampling
from nemo_spin.generation.request import EngineSettings, GenerationRequest, Pass, read_request
from nemo_spin.generation.resume import keep_sound_shards, write_request
from nemo_spin.generation.shards import PreparedRows, answers_table, plan_shards, write_shard
from tests import prepared

ENGINE = EngineSettings("vllm", "/model", "float32", 1, 64, 256, None, 512, 300, "a")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return prepared.write(tmp_path / "data", train=prepared.rows(20, seed=1)) / "train.parquet"


def _request(
    tmp_path: Path, data: Path, *, shard_rows: int = 6, temperature: float = 1.0
) -> GenerationRequest:
    sampling = Sampling(temperature, 1.0, 0, 8, (3, 7))
    generation = Pass(
        "train", str(data), sampling, 1, 1234, 0, "a" * 64, plan_shards("train", 20, shard_rows)
    )
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    return GenerationRequest(ENGINE, (generation,), str(out), "/progress", "/status", "/log", None)


def _answer(request: GenerationRequest, *indices: int) -> None:
    (generation,) = request.passes
    rows = PreparedRows(Path(generation.prepared))
    for shard in (generation.shards[index] for index in indices):
        answers = [Answer([9, 3], [-1.0, -2.0], "stop")] * shard.rows
        table = answers_table(rows.read(shard.start, shard.rows), answers, generation)
        write_shard(Path(request.out_dir) / shard.file, table)


def test_a_request_is_read_as_it_was_written(tmp_path: Path, data: Path) -> None:
    request = _request(tmp_path, data)
    assert read_request(write_request(request, {"data": "x"})) == request


def test_the_same_inputs_may_be_cut_otherwise(tmp_path: Path, data: Path) -> None:
    write_request(_request(tmp_path, data), {"config": {"seed": 1}})
    other = _request(tmp_path, data, shard_rows=3)
    assert read_request(write_request(other, {"config": {"seed": 1}})) == other


def test_each_difference_is_named(tmp_path: Path, data: Path) -> None:
    write_request(_request(tmp_path, data), {"config": {"generation.top_p": 1.0}, "data": "x"})
    with pytest.raises(ConfigError) as caught:
        write_request(
            _request(tmp_path, data, temperature=0.7), {"config": {"generation.top_p": 0.9}, "weights": "y"}
        )
    message = str(caught.value)
    assert "generation.top_p: was 1.0, is 0.9" in message
    assert 'data: was "x", is not there' in message
    assert 'weights: was not there, is "y"' in message
    assert "passes.train.temperature: was 1.0, is 0.7" in message


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"inputs": 3}', "\x00"])
def test_a_damaged_request_is_written_again(tmp_path: Path, data: Path, content: str) -> None:
    request = _request(tmp_path, data)
    (tmp_path / "out" / "request.json").write_text(content)
    assert read_request(write_request(request, {})) == request


class _Notes(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_sound_shards_stay_and_all_others_go(tmp_path: Path, data: Path) -> None:
    request = _request(tmp_path, data)
    _answer(request, 0, 1, 2)
    out = Path(request.out_dir)
    (out / "train-shard-00001-of-00004.parquet").write_bytes(b"PAR1 half a file")
    (out / "train-shard-00000-of-00009.parquet").write_bytes(b"of another cut")
    (out / ".train-shard-00003-of-00004.parquet.77.partial").write_bytes(b"of a killed writer")
    (out / "mine.txt").write_text("the user's")
    progress = _Notes()
    assert keep_sound_shards(request, progress) == 2
    assert sorted(path.name for path in out.iterdir()) == [
        "mine.txt",
        "train-shard-00000-of-00004.parquet",
        "train-shard-00002-of-00004.parquet",
    ]
    assert any("train-shard-00001-of-00004.parquet" in note for note in progress.notes)


def test_nothing_is_missing_when_all_is_there(tmp_path: Path, data: Path) -> None:
    request = _request(tmp_path, data)
    _answer(request, 0, 1, 2, 3)
    assert keep_sound_shards(request, SilentProgress()) == 0


def test_a_renamed_shard_is_not_taken_for_another(tmp_path: Path, data: Path) -> None:
    request = _request(tmp_path, data)
    _answer(request, 0)
    out = Path(request.out_dir)
    (out / "train-shard-00000-of-00004.parquet").rename(out / "train-shard-00002-of-00004.parquet")
    assert keep_sound_shards(request, SilentProgress()) == 4
    write_json(out / "unrelated.json", {})
