"""Adds nemo_spin, and what it lacks, to the environment of a container, and replaces nothing there.

NVIDIA's containers hold builds of torch, Transformer Engine, Apex, Megatron-Core and vLLM that fit
each other and are on no index. Every installed version is pinned while pip adds the rest; afterwards
versions and places are compared. The Dockerfile does this; inside a running container it is

    python examples/install_in_container.py

Exit code 2: the environment is not as it should be; what to do is on the last lines.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
# What the container was built around: distribution -> module. Never replaced, whatever is asked for.
KEPT = {
    "torch": "torch",
    "transformer-engine": "transformer_engine",
    "apex": "apex",
    "megatron-core": "megatron.core",
    "vllm": "vllm",
    "triton": "triton",
    "flash-attn": "flash_attn",
}
# NeMo asks for a Lightning that forbids today's versions of packaging and fsspec. Of what these
# ask for, only what is missing is installed; what is there in a version they did not foresee is named.
# In this order: who asks before who is asked for.
LOOSE = ("nemo-toolkit", "nv-one-logger-pytorch-lightning-integration", "lightning")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"[0-9][0-9A-Za-z.!+_-]*")


def normalized(requirement: str) -> str:
    """The distribution's name in a requirement, as indexes spell it; empty if there is none."""
    found = _NAME.match(requirement.strip())
    return re.sub(r"[-_.]+", "-", found.group()).lower() if found else ""


def snapshot() -> dict[str, dict[str, str]]:
    """Versions of all distributions, and where the kept modules lie (some are bare source trees)."""
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # the first on the path is the one that is imported
            versions.setdefault(normalized(name), distribution.version)
    places = {module: _place(module) for module in KEPT.values()}
    return {"versions": versions, "places": {name: place for name, place in places.items() if place}}


def _place(module: str) -> str:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a parent package is missing
        return ""
    return (spec.origin or ",".join(spec.submodule_search_locations or ())) if spec else ""


def constraints(versions: dict[str, str], may_change: set[str], given: str) -> list[str]:
    """Pins of everything installed, and the image's own constraints for what is not.

    Args:
        versions: Of all installed distributions.
        may_change: Names that get no pin.
        given: PIP_CONSTRAINT as the image sets it: files, separated by blanks. What they say of
            installed packages may be out of date, and is left out.
    """
    lines = [f"{name}=={version}" for name, version in versions.items() if _VERSION.fullmatch(version)]
    for path in given.split():
        if Path(path).is_file():
            lines += [
                line.split(" #")[0].strip()
                for line in Path(path).read_text(encoding="utf-8").splitlines()
                if normalized(line) and normalized(line) not in versions
            ]
    return sorted(line for line in set(lines) if normalized(line) not in may_change)


def requirements(present: dict[str, dict[str, str]]) -> list[str]:
    """What pyproject.toml asks for to train and to build it; not what is there as a bare source tree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["train"],
    ]
    bare = {
        name
        for name, module in KEPT.items()
        if name not in present["versions"] and module in present["places"]
    }
    return [requirement for requirement in wanted if normalized(requirement) not in bare]


def loosened(
    name: str, extras: set[str], versions: dict[str, str], may_change: set[str]
) -> tuple[list[str], list[str]]:
    """What an installed package of `LOOSE` asks for: what to install, and notes on what it did not foresee.

    Args:
        name: The package, installed without its dependencies.
        extras: Its extras that are wanted.
        versions: Of all distributions of the container.
        may_change: Names whose requirement is installed as it stands.
    """
    from pip._vendor.packaging.requirements import Requirement  # pip is here; packaging may not be

    importlib.invalidate_caches()
    missing, notes = [], []
    for line in importlib.metadata.requires(name) or ():
        requirement = Requirement(line)
        marker, requirement.marker = requirement.marker, None
        if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        found = versions.get(normalized(requirement.name))
        if found is None or normalized(requirement.name) in may_change | KEPT.keys():
            missing.append(str(requirement))
        elif not requirement.specifier.contains(found, prereleases=True):
            notes.append(f"{name} asks for {requirement}, {found} stays")
    return missing, notes


def add_packages(path: Path, before: dict[str, dict[str, str]], may_change: set[str]) -> None:
    """Installs all that is missing under the constraints in `path`, then the project.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    wanted = requirements(before)
    notes: list[str] = []
    for name in LOOSE:
        own = [requirement for requirement in wanted if normalized(requirement) == name]
        if not own:
            continue
        pip("install", "--no-deps", "--constraint", str(path), *own)
        extras = {
            extra for line in own for listed in re.findall(r"\[(.*?)\]", line) for extra in listed.split(",")
        }
        asked, unforeseen = loosened(name, extras, before["versions"], may_change)
        wanted = [requirement for requirement in wanted if requirement not in own] + asked
        notes += unforeseen
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{name}=={importlib.metadata.version(name)}\n")
    pip("install", "--constraint", str(path), *wanted)
    pip("install", "--no-deps", "--no-build-isolation", "--constraint", str(path), str(ROOT))
    for note in notes:
        print(f"note: {note}")


def changes(
    before: dict[str, dict[str, str]], after: dict[str, dict[str, str]], may_change: set[str]
) -> list[str]:
    """One line for every version or place that is another one now."""
    return [
        f"{name}: {was} -> {after[kind].get(name, 'gone')}"
        for kind in ("versions", "places")
        for name, was in sorted(before[kind].items())
        if name not in may_change and after[kind].get(name) != was
    ]


def pip(*arguments: str) -> None:
    """Runs pip of the running interpreter, without the image's own constraints.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, env=environment)


def fail(message: str, *lines: str) -> NoReturn:
    """Ends with a message of a few lines."""
    print("\n  ".join([f"error: {message}", *lines]), file=sys.stderr)
    sys.exit(2)


def install(path: Path, may_change: set[str]) -> None:
    """Installs under the constraints written to `path`, and compares."""
    before = snapshot()
    if "torch" not in before["places"]:
        fail(
            f"{sys.executable} has no torch",
            "rule:   the environment of a container that brings its own torch",
            "remedy: start from an NGC NeMo or PyTorch container; elsewhere: bash examples/install.sh",
        )
    lines = constraints(before["versions"], may_change, os.environ.get("PIP_CONSTRAINT", ""))
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    try:
        add_packages(path, before, may_change)
    except subprocess.CalledProcessError:
        fail(
            "pip could not add what nemo_spin needs to the packages that are there",
            f"rule:   {len(before['versions'])} installed packages stay as they are",
            "remedy: where pip names a conflict with a package that may be replaced, allow it:",
            "        --may-change NAME (docker build --build-arg MAY_CHANGE=NAME); or take another base",
        )
    fresh = subprocess.run(
        [sys.executable, __file__, "--snapshot"], check=True, capture_output=True, text=True
    )
    after = json.loads(fresh.stdout)
    changed = changes(before, after, may_change)
    if changed:
        fail("the installation has replaced packages of the container", *changed)
    added = sorted(set(after["versions"]) - set(before["versions"]))
    print(f"unchanged: {len(before['versions'])} packages, among them")
    for name, module in KEPT.items():
        place = after["places"].get(module)
        print(f"  {name} {after['versions'].get(name, '')} {place or 'is not there'}")
    print(f"added: {', '.join(added)}")
    if "vllm" not in after["places"]:
        print("no vLLM here: set generation.python to an environment that has it")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--constraints", type=Path, help="keep the pins in this file")
    parser.add_argument("--may-change", nargs="*", default=[], metavar="NAME", help="pip may replace these")
    parser.add_argument("--snapshot", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.snapshot:
        print(json.dumps(snapshot()))
        return
    may_change = {normalized(name) for name in arguments.may_change}
    if may_change & KEPT.keys():
        fail(
            f"--may-change {' '.join(sorted(may_change & KEPT.keys()))}",
            f"rule:   never replaced: {', '.join(KEPT)}",
            "remedy: another container (BASE_IMAGE) that brings the wanted version",
        )
    with tempfile.TemporaryDirectory() as directory:
        path = arguments.constraints or Path(directory) / "constraints.txt"
        install(path, may_change | {"nemo-spin"})  # an older one of ours


if __name__ == "__main__":
    main()
