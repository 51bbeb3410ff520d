"""The errors a user can cause, and the form their messages take.

Every message names what was wrong (a key or a file), the value found, the rule it
breaks and what to do. Commands print the message without a traceback and exit with
`exit_code`; an exception of any other type is a defect of this package.
"""

from __future__ import annotations

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again
TRY_LATER = 76  # what failed may have passed by the next start: a lost node, a file system


class NemoSpinError(Exception):
    """Base of every error that a user's input, files or machine can cause."""

    exit_code = 2


class ConfigError(NemoSpinError):
    """A configuration key, override or command-line argument cannot be used."""


class DataError(NemoSpinError):
    """Demonstrations, prepared rows or shards cannot be used."""


class GenerationError(NemoSpinError):
    """The sampler could not be started or did not answer as it must."""


class CheckpointError(NemoSpinError):
    """A checkpoint (Hugging Face or Megatron) cannot be read or does not fit.

    Attributes:
        key: Of config.json, where one property of the model is at fault.
    """

    key: str | None = None


class ExportError(NemoSpinError):
    """A checkpoint could not be written, or did not read back bit for bit."""


class MachineError(NemoSpinError):
    """Something is missing on this machine, or wrong, with which a run would fail."""


class GateError(NemoSpinError):
    """A numerical gate (ln 2, sampler, export) failed: going on would train on wrong numbers."""


class GuardError(NemoSpinError):
    """A guard stopped the loop: going on would make the model worse. What there is stays."""

    exit_code = 3


class StageError(NemoSpinError):
    """A stage's process ended without saying why; its log is named in the message."""

    exit_code = 1


class PreemptedError(NemoSpinError):
    """SIGTERM or SIGUSR1 came: what there was to save is saved, and the same command goes on."""

    exit_code = PREEMPTED


def explain(what: str, *, found: object, rule: str, remedy: str) -> str:
    """Words a mistake the way every message of this package does.

    Args:
        what: The key or the file at fault, such as `spin.beta` or a path.
        found: The value or state that was found.
        rule: What would have been right.
        remedy: What the user can do now.
    """
    return f"{what}: {found}\n  rule:   {rule}\n  remedy: {remedy}"


_BY_NAME = {
    cls.__name__: cls
    for cls in (
        ConfigError,
        DataError,
        GenerationError,
        CheckpointError,
        ExportError,
        MachineError,
        GateError,
        GuardError,
        StageError,
        PreemptedError,
    )
}


def error_from_name(name: str, message: str) -> NemoSpinError:
    """Rebuilds the typed error that a stage's process reported by name."""
    return _BY_NAME.get(name, StageError)(message)
