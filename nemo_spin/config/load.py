"""Reads the configuration: schema, YAML files, overrides; and writes it, resolved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nemo_spin.config.mistakes import mistake, mistaken_keys, raise_together, touches
from nemo_spin.config.schema import Config
from nemo_spin.config.typed import build
from nemo_spin.config.validate import find_mistakes
from nemo_spin.errors import ConfigError, explain


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines on one line, in double quotes."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        has_breaks = len(f"{text}.".splitlines()) > 1  # YAML folds some, unless they are escaped
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if has_breaks else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def load_config(source: str | None, overrides: Sequence[str], *, command: str | None = None) -> Config:
    """Loads a configuration; every mistake in it is reported at once.

    Args:
        source: Name of a file in `conf/`, path of a YAML file, or None for `conf/spin.yaml`.
        overrides: `key=value`, `+key=value`, `~key` and `group=option`, later ones win.
        command: Command that will use it, to check the rules of `validate` too. With
            None the rules are checked only along with mistakes of type or spelling.

    Raises:
        ConfigError: The file or any key, value or override cannot be used.
    """
    from nemo_spin.config.compose import compose_source  # Hydra: only where something is composed

    composed = compose_source(source, overrides)
    config, mistakes = build(composed.values, origins=composed.origins)
    mistakes = [*composed.mistakes, *mistakes]
    if mistakes or command is not None:
        mistaken = mistaken_keys(mistakes)
        mistakes += [
            entry for entry in find_mistakes(config, command=command) if not touches(entry.keys, mistaken)
        ]
    raise_together(mistakes)
    return config


def from_mapping(values: Mapping[Any, Any]) -> Config:
    """The configuration that nested plain mappings describe (a script's own composition).

    Raises:
        ConfigError: A key is not known, or a value has the wrong type.
    """
    config, mistakes = build(values)
    raise_together(mistakes)
    return config


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML, keys in the schema's order; `read_yaml` reads it back."""
    values = dataclasses.asdict(config)
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


def read_yaml(path: Path) -> Config:
    """Reads a resolved configuration (`config.yaml` of a run directory), as it stands.

    Raises:
        ConfigError: The file is not there, or is no configuration.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            explain(
                str(path),
                found="; ".join(str(error).splitlines()),
                rule="the resolved configuration that `nemo-spin` wrote",
                remedy="restore the file, or start in a new run directory",
            )
        ) from error
    config, mistakes = build(values if isinstance(values, Mapping) else {})
    if not isinstance(values, Mapping):
        mistakes = [
            mistake(
                str(path),
                found="is not a YAML mapping",
                rule="the resolved configuration that `nemo-spin` wrote",
                remedy="restore the file, or start in a new run directory",
            )
        ]
    raise_together(mistakes)
    return config
