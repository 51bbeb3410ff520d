"""The files of a .nemo: a tar archive that is written whole, and unpacked without trusting it."""

from __future__ import annotations

import socket
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from torch import distributed

from nemo_spin.data.files import atomic_path
from nemo_spin.errors import CheckpointError, error_from_name, explain
from nemo_spin.megatron.agreement import from_first_rank


def pack(directory: Path, archive: Path) -> None:
    """Writes everything in `directory` as `archive`, uncompressed as NeMo does, in one piece or not at all.

    Raises:
        DataError: The disk is full.
    """
    with atomic_path(archive) as partial, tarfile.open(partial, "w:") as tar:
        for path in sorted(directory.rglob("*")):
            tar.add(path, arcname=f"./{path.relative_to(directory)}", recursive=False)


def unpack(archive: Path, directory: Path) -> None:
    """Unpacks `archive` into `directory`.

    Raises:
        CheckpointError: It is no archive, or a member would lie outside or is no plain file.
    """
    try:
        with tarfile.open(archive, "r:*") as tar:  # older .nemo files are compressed
            for member in tar:
                _check(archive, member)
                tar.extract(member, directory, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise _refused(archive, f"is not a .nemo archive ({error})") from error


def _check(archive: Path, member: tarfile.TarInfo) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise _refused(archive, f"has a member outside of it: {member.name}")
    if not member.isfile() and not member.isdir():
        raise _refused(archive, f"has a member that is neither file nor directory: {member.name}")


def _refused(archive: Path, found: str) -> CheckpointError:
    return CheckpointError(
        explain(
            str(archive),
            found=found,
            rule="a tar archive of plain files, as save_to writes it",
            remedy="use a file from a source you trust, or copy it again",
        )
    )


@contextmanager
def unpacked(source: Path) -> Iterator[Path]:
    """Yields a directory with the archive's files on every node; all ranks must enter.

    Args:
        source: A .nemo file, unpacked once per node into a temporary directory (`TMPDIR`), or a
            directory into which one was unpacked, which is used as it is.

    Raises:
        CheckpointError: The archive is refused, on all ranks.
    """
    if from_first_rank(source.is_dir):
        yield source
        return
    world_size = distributed.get_world_size()
    hosts: list[Any] = [None] * world_size
    distributed.all_gather_object(hosts, socket.gethostname())
    leader = hosts.index(hosts[distributed.get_rank()])
    with tempfile.TemporaryDirectory(prefix="nemo-") as temporary:
        problem = None
        if leader == distributed.get_rank():
            try:
                unpack(source, Path(temporary))
            except CheckpointError as error:
                problem = str(error)
            except OSError as error:
                problem = str(_refused(source, f"could not be unpacked into {temporary} ({error})"))
        found: list[Any] = [None] * world_size
        distributed.all_gather_object(found, (temporary, problem))
        for _, said in found:
            if said is not None:
                raise error_from_name("CheckpointError", said)
        yield Path(found[leader][0])
        distributed.barrier()  # the leader's files stay until everybody has read them
