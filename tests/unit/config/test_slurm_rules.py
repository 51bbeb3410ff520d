"""Values of `launcher.slurm` that Slurm, pyxis or the shell could not take."""

from __future__ import annotations

import pytest

from tests.unit.config.test_validate import accepted, refused


def test_what_slurm_understands_is_accepted() -> None:
    accepted(
        "launcher.name=slurm",
        "trainer.num_nodes=2",
        "launcher.slurm.time='1-12:30'",
        "launcher.slurm.options=[--exclusive, --mem=0, '--reservation=a b']",
        "launcher.slurm.modules=[cuda/12.4]",
        "launcher.slurm.environment={NCCL_DEBUG: INFO, A: 1}",
        "launcher.slurm.container_image=registry#image:tag",
        "launcher.slurm.container_mounts=['/a b:/b', '/c:/c:ro']",
    )


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ('launcher.slurm.account="a\\nb"', "a line of text without control characters"),
        ('launcher.slurm.options=["--comment=a\\n#SBATCH"]', "a line of text without control characters"),
        ("launcher.slurm.time='tomorrow'", "minutes, hours:minutes:seconds or days-hours"),
        ("launcher.slurm.options=[-N2]", "long options of sbatch"),
        ("launcher.slurm.options=['--nodes=3']", "of those that no key stands for"),
        ("launcher.slurm.environment={'A B': 1}", "names of variables, and texts or numbers"),
        ("launcher.slurm.environment={A: [1]}", "names of variables, and texts or numbers"),
        ("launcher.slurm.container_mounts=['/a:/b']", "only a container has mounts"),
        ("launcher.slurm.signal_s=0", "a whole number from 1 to 65535"),
        ("launcher.slurm.container_runtime=docker", "must be pyxis or apptainer or singularity"),
    ],
)
def test_what_it_does_not_is_refused(override: str, rule: str) -> None:
    assert rule in refused(override)


def test_slurm_warns_earlier_than_a_run_needs_to_save() -> None:
    given = ("launcher.name=slurm", "launcher.preemption_grace_s=120")
    accepted(*given, "launcher.slurm.signal_s=121")
    assert "120, with launcher.slurm.signal_s 120" in refused(*given, "launcher.slurm.signal_s=120")


def test_a_mount_is_one_mount() -> None:
    image = "launcher.slurm.container_image=i"
    for mount in ("/a:/b,/c:/d", "/a", "/a:/b:ro:x"):
        assert "SOURCE:TARGET" in refused(image, f"launcher.slurm.container_mounts=['{mount}']")


def test_a_run_directory_that_no_mount_can_name_is_refused_with_a_container_alone() -> None:
    for run_dir in ("/a,b", "/12:00"):
        assert "its path has no comma and no colon" in refused(
            f"run_dir='{run_dir}'", "launcher.slurm.container_image=i"
        )
        accepted(f"run_dir='{run_dir}'", "launcher.name=slurm")


def test_a_key_is_not_to_be_written_into_the_script() -> None:
    text = refused("launcher.slurm.environment={NEMO_SPIN_SERVER_KEY: sk-secret}")
    assert "a key is written into no file" in text
    assert "sk-secret" not in text
