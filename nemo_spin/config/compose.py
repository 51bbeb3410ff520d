"""Hydra's composition of a YAML file, its `defaults` and command-line overrides.

Hydra composes files; the values on the command line are put on top here, so that every
one that is wrong can be reported, not only the first. Nothing is written and the
working directory is not changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.resources
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import MISSING, Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from nemo_spin.config.mistakes import Mistake, mistake, nearest, raise_together
from nemo_spin.config.schema import Config
from nemo_spin.config.typed import Unresolved

BASE = "spin"  # the configuration that is used where none is named
RECIPES = "recipe"  # directory of whole configurations for one model, named `recipe/NAME`
_OVERRIDE = re.compile(r"(?P<key>[A-Za-z_][\w.]*)=(?P<text>[^\[{'\"].*)", re.DOTALL)
_OVERRIDES_RULE = "overrides are spelt key=value, lists key=[a,b]"


@dataclasses.dataclass
class Composed:
    """What a file and overrides say, not yet checked against the schema.

    Attributes:
        values: Nested plain values over the schema's defaults, interpolations resolved.
        origins: Dotted key -> the override that set it.
        mistakes: What was wrong with the overrides themselves.
    """

    values: dict[Any, Any]
    origins: dict[str, str]
    mistakes: list[Mistake]


def conf_dir() -> Path:
    """The directory of the YAML files that come with the package.

    It lies inside an installed package, and next to the package in the repository.
    """
    package = Path(str(importlib.resources.files("nemo_spin")))
    candidates = [package / "conf", package.parent / "conf"]
    return next((path for path in candidates if (path / f"{BASE}.yaml").is_file()), candidates[-1])


def names() -> list[str]:
    """The configurations that `--config` knows by name."""
    found = [*conf_dir().glob("*.yaml"), *(conf_dir() / RECIPES).glob("*.yaml")]
    return sorted(path.relative_to(conf_dir()).with_suffix("").as_posix() for path in found)


def compose_source(source: str | None, overrides: Sequence[str]) -> Composed:
    """Composes a named configuration or a YAML file with `overrides`.

    Args:
        source: Name of a file in `conf/` (`spin`, `recipe/NAME`), path of a YAML file, or None for the base.
        overrides: `key=value`, `+key=value`, `~key` and `group=option`.

    Raises:
        ConfigError: There is no such file, or it cannot be composed at all.
    """
    path = _find(source if source is not None else BASE)
    directories = [path.parent, conf_dir()]
    groups, values, mistakes = _sort_overrides(overrides, directories)
    with _as_mistakes(path, mistakes):
        config = _compose_file(path, groups)
    origins: dict[str, str] = {}
    for override in values:
        mistakes += _apply(config, override)
        origins[override.key_or_group] = override.input_line or ""
    defaults = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(Config)))
    merged = OmegaConf.merge(defaults, config)
    return Composed(values=_plain(merged), origins=origins, mistakes=mistakes)


def _find(source: str) -> Path:
    """The YAML file that `--config` means."""
    named = conf_dir() / f"{source}.yaml"
    if source in names():
        return named
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".yaml":
        return path.absolute()
    found = "there is no such file"
    if path.exists():
        found = "is not a file" if not path.is_file() else f"has the ending {path.suffix!r}, not '.yaml'"
    guess = nearest(source, names())
    entry = mistake(
        f"--config {source}",
        found=found,
        rule=f"the path of a file that ends in .yaml, or one of the names {', '.join(names())}",
        remedy=f"did you mean `{guess}`?"
        if guess
        else "check the path (it is relative to the working directory)",
    )
    raise_together([entry])
    raise AssertionError("unreachable: a mistake was raised")


def _sort_overrides(
    overrides: Sequence[str], directories: Sequence[Path]
) -> tuple[list[str], list[Override], list[Mistake]]:
    """Tells choices of a config group from values; what cannot be read is a mistake."""
    parser = OverridesParser.create()
    groups, values, mistakes = [], [], []
    for line in overrides:
        try:
            override = _parse(parser, line)
        except HydraException as error:
            remedy = "write key=value" if "=" not in line else "put the value in quotes: 'key=\"value\"'"
            mistakes.append(_bad_override(line, f"cannot be read ({str(error).splitlines()[0]})", remedy))
            continue
        key = override.key_or_group
        if override.is_sweep_override():
            mistakes.append(_bad_override(line, "is a sweep", f"for a list, write {key}=[…] with brackets"))
        elif not key:
            mistakes.append(_bad_override(line, "has no key", "name the key to set"))
        elif override.package is not None or "/" in key or _is_choice(override, directories):
            problem = _check_group(override, directories)
            mistakes += problem
            if not problem:
                groups.append(line)
        else:
            values.append(override)
    return groups, values, mistakes


def _parse(parser: OverridesParser, line: str) -> Override:
    """Parses one override; a value outside Hydra's grammar is the text that it is."""
    try:
        return parser.parse_override(line)
    except HydraException:
        match = _OVERRIDE.fullmatch(line)
        if match is None:
            raise
        template = parser.parse_override(f"{match['key']}=''")
        return dataclasses.replace(template, _value=match["text"], input_line=line)


def _bad_override(line: str, found: str, remedy: str) -> Mistake:
    return mistake(f"override {line!r}", found=found, rule=_OVERRIDES_RULE, remedy=remedy)


def _options(group: str, directories: Sequence[Path]) -> list[str]:
    return sorted({path.stem for directory in directories for path in (directory / group).glob("*.yaml")})


def _is_choice(override: Override, directories: Sequence[Path]) -> bool:
    """Whether `launcher=local` chooses a file of the group (and is no mapping)."""
    is_name = isinstance(override.value(), (str, list)) or override.is_delete()
    return is_name and bool(_options(override.key_or_group, directories))


def _check_group(override: Override, directories: Sequence[Path]) -> list[Mistake]:
    """A choice must name a group, and a file in it."""
    group, chosen = override.key_or_group, override.value()
    if group == RECIPES:
        return [
            _bad_override(str(override.input_line), "a recipe is no group", f"use --config {RECIPES}/NAME")
        ]
    options = _options(group, directories)
    if not options:
        groups = sorted(
            str(path.parent.relative_to(directory))
            for directory in directories
            for path in directory.rglob("*/*.yaml")
        )
        guess = nearest(group, groups)
        return [
            mistake(
                f"override {override.input_line!r}",
                found=f"there is no config group {group!r}",
                rule=f"a group is a directory of YAML files: {', '.join(dict.fromkeys(groups))}",
                remedy=f"did you mean `{guess}`?" if guess else "set single values with section.key=value",
            )
        ]
    wrong = [name for name in (chosen if isinstance(chosen, list) else [chosen]) if name not in options]
    if not wrong or override.is_delete():
        return []
    guess = nearest(str(wrong[0]), options)
    return [
        mistake(
            f"override {override.input_line!r}",
            found=f"the group {group!r} has no file {wrong[0]!r}",
            rule=f"one of {', '.join(options)}",
            remedy=f"did you mean `{guess}`?" if guess else "choose one of these, or set single values",
        )
    ]


def _compose_file(path: Path, groups: Sequence[str]) -> DictConfig:
    """Lets Hydra follow the `defaults` of `path`; groups are sought beside it, then in `conf/`."""
    with path.open(encoding="utf-8") as stream:
        content = yaml.safe_load(stream)
    if content is not None and not isinstance(content, Mapping):
        raise yaml.YAMLError(f"the file holds a {type(content).__name__}, not a mapping")
    quoted = str(conf_dir()).replace("\\", "\\\\").replace("'", "\\'")
    search_path = f"hydra.searchpath=['file://{quoted}']"
    with _hydra_set_aside(), initialize_config_dir(version_base="1.3", config_dir=str(path.parent)):
        config = compose(path.stem, overrides=[search_path, *groups])
    OmegaConf.set_struct(config, False)
    return config


@contextlib.contextmanager
def _hydra_set_aside() -> Iterator[None]:
    """Lets a script that is a Hydra application itself (`hydra_runner`) compose ours too."""
    theirs = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        if theirs is not None:
            GlobalHydra.instance().initialize(theirs)


@contextlib.contextmanager
def _as_mistakes(path: Path, mistakes: Sequence[Mistake]) -> Iterator[None]:
    """Reports what keeps a file from being composed, with what was found before."""
    try:
        yield
    except RecursionError:
        found, remedy = "the `defaults` include the file itself", "rename the file, or remove that entry"
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        lines = str(error).split("Config search path:")[0].strip().splitlines()
        found, remedy = "; ".join(line.strip() for line in lines if line.strip()), "mend the file"
    else:
        return
    rule = "a YAML mapping, whose `defaults` name files beside it or in conf/"
    raise_together([*mistakes, mistake(str(path), found=found, rule=rule, remedy=remedy)])


def _apply(config: DictConfig, override: Override) -> list[Mistake]:
    """Puts one value of the command line into `config`."""
    key = override.key_or_group
    try:
        if not override.is_delete():
            OmegaConf.update(config, key, override.value(), merge=True, force_add=True)
            return []
        section, _, name = key.rpartition(".")
        parent = OmegaConf.select(config, section) if section else config
        if isinstance(parent, DictConfig) and name in parent:
            del parent[name]
            return []
        found = "there is no such key in the file"
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        found = str(error).splitlines()[0]
    return [
        _bad_override(
            override.input_line or key, found, "check the key; `nemo-spin validate-config` prints all"
        )
    ]


def _plain(node: Any) -> Any:
    """Nested plain values; what cannot be resolved becomes an `Unresolved`."""
    if isinstance(node, DictConfig):
        if node._is_none():
            return None
        return {key: _plain_child(node, key) for key in node}
    if isinstance(node, ListConfig):
        return None if node._is_none() else [_plain_child(node, index) for index in range(len(node))]
    return node


def _plain_child(node: Container, key: Any) -> Any:
    if OmegaConf.is_missing(node, key):
        return MISSING
    try:
        return _plain(node[key])
    except InterpolationToMissingValueError:
        return MISSING
    except OmegaConfBaseException as error:
        raw = OmegaConf.to_container(node, resolve=False)
        assert isinstance(raw, (dict, list)), "a container holds the value"
        return Unresolved(str(raw[key]), str(error).splitlines()[0])
