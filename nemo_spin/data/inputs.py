"""What prepared data depends on: the hashes that decide whether it can be used again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_spin.config.schema import DataConfig
from nemo_spin.data.files import sha256_file, sha256_files, sha256_text
from nemo_spin.data.sources import is_hub_id
from nemo_spin.errors import ConfigError, DataError, explain

FORMAT_VERSION = 1  # raised when the same inputs begin to give other rows

# Settings that name the data (its hash stands for it) or cannot change a byte of the result.
_NOT_SETTINGS = {
    "train",
    "heldout",
    "train_split",
    "heldout_split",
    "subset",
    "revision",
    "max_quarantined_share",
    "num_workers",
}
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",  # more token ids that end an answer
)


def prepare_inputs(config: DataConfig, tokenizer_dir: Path) -> dict[str, Any]:
    """Everything the prepared rows depend on, for the manifest's `inputs`.

    A hub data set counts by its name, split, subset and the configured revision, not by
    the commit that the name stands for today: a run must go on when the hub has moved on.
    The chat template counts as one of the tokenizer's files.

    Raises:
        DataError: A data file is not there.
        ConfigError: There is no tokenizer in `tokenizer_dir`.
    """
    heldout = config.heldout
    settings = {key: value for key, value in asdict(config).items() if key not in _NOT_SETTINGS}
    return {
        "version": FORMAT_VERSION,
        "train": _source_identity(config.train, "data.train", config.train_split, config),
        "heldout": heldout and _source_identity(heldout, "data.heldout", config.heldout_split, config),
        "tokenizer": tokenizer_hashes(tokenizer_dir),
        "config": settings,
    }


def tokenizer_hashes(tokenizer_dir: Path) -> dict[str, str]:
    """Relative name -> sha256 of the files that make a tokenizer and its template.

    Raises:
        ConfigError: There is none.
    """
    files = sorted({path for pattern in _TOKENIZER_FILES for path in tokenizer_dir.glob(pattern)})
    hashes = {
        str(path.relative_to(tokenizer_dir)): digest
        for path, digest in sha256_files([path for path in files if path.is_file()]).items()
    }
    if not set(hashes) - {"generation_config.json"}:
        raise ConfigError(
            explain(
                f"model.path={tokenizer_dir}",
                found="holds no tokenizer" if tokenizer_dir.is_dir() else "is not a directory",
                rule="a Hugging Face directory with tokenizer.json (or the files of its tokenizer)",
                remedy="point model.path at a complete model directory",
            )
        )
    return hashes


def _source_identity(spec: str, key: str, split: str, config: DataConfig) -> Any:
    path = Path(spec).expanduser()
    if path.is_file():
        return sha256_file(path)
    if path.is_dir():
        files = sorted(entry for entry in path.rglob("*") if entry.is_file())
        digests = sha256_files(files)
        lines = [f"{entry.relative_to(path)} {digests[entry]}" for entry in files]
        return {"directory": sha256_text("\n".join(lines)), "split": split, "subset": config.subset}
    if is_hub_id(spec):
        return {"hub": spec, "split": split, "subset": config.subset, "revision": config.revision}
    raise DataError(
        explain(
            f"{key}={spec}",
            found="there is no such file",
            rule="an existing file or directory, or a hub data set (organisation/name)",
            remedy="check the path; relative ones start at the current directory",
        )
    )
