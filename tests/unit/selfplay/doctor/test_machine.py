"""GPUs are a stand-in here: a program `nvidia-smi` that prints what one with two of them would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_spin.selfplay.doctor.machine import disk, examine_machine

_TOPOLOGY = "\tGPU0\tGPU1\nGPU0\t X \t{link}\nGPU1\t{link}\t X \n\nLegend:\n  NV#  = a number of NVLinks\n"


def put_nvidia_smi(directory: Path, link: str) -> None:
    program = directory / "nvidia-smi"
    topology = _TOPOLOGY.format(link=link).replace("\n", "\\n").replace("\t", "\\t")
    program.write_text(
        "#!/bin/sh\n"
        f"if [ \"$1\" = topo ]; then printf '{topology}'\n"
        "else echo 'NVIDIA A100, 81920 MiB, 550.1'; echo 'NVIDIA A100, 81920 MiB, 550.1'; fi\n"
    )
    program.chmod(0o755)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are real GPUs")
@pytest.mark.parametrize(("link", "has_nvlink"), [("NV12", True), ("PHB", False)])
def test_gpus_that_torch_cannot_use_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str, *, has_nvlink: bool
) -> None:
    put_nvidia_smi(tmp_path, link)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = {finding.name: finding for finding in examine_machine(tmp_path, writes=False)}
    assert found["GPUs"].text == "2 x NVIDIA A100, 81920 MiB, driver 550.1"
    assert found["GPUs"].status == found["NCCL"].status == "error"
    assert torch.__version__ in found["GPUs"].remedy
    assert (found["links"].text == "NVLink") is has_nvlink
    assert (found["links"].status == "ok") is has_nvlink
    assert "disk" not in found


def test_a_machine_without_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {finding.name: finding for finding in examine_machine(tmp_path, writes=False)}
    assert found["GPUs"].text.startswith("none")
    assert {finding.status for finding in found.values()} == {"ok"}


def test_the_disk_of_a_directory_that_is_to_be_made(tmp_path: Path) -> None:
    found = disk(tmp_path / "runs" / "first")
    assert found.status == "ok"
    assert found.text.startswith(f"{tmp_path}: ")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_cannot_be_written_to_is_an_error() -> None:
    found = disk(Path("/proc/runs"))
    assert found.status == "error"
    assert found.remedy
