"""The sampler's process as seen from the command that started it: a group, its input, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from nemo_spin.errors import GenerationError, explain
from nemo_spin.generation.lifeline import PARENT_VARIABLE
from nemo_spin.generation.placement import HERE, Placement

_MODULE = "nemo_spin.generation.worker"
_GRACE_S = 5.0
# Of a launcher such as srun: killed itself it would leave its step alive, GPUs and all. At SIGTERM it
# has Slurm kill the step, and waits for that for KillWait (slurm.conf, often 30 s) and 2 s at most.
_LAUNCHER_GRACE_S = 60.0
_NOT_INHERITED = frozenset(
    {"PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__", "MASTER_ADDR", "MASTER_PORT"}
    | {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
)


@dataclass(frozen=True)
class Interpreter:
    """What the sampler runs under.

    Attributes:
        python: The interpreter that has the engine.
        python_path: Its PYTHONPATH, in which it finds this package.
    """

    python: str
    python_path: str


class SamplerProcess:
    """A sampler's process in a group of its own, which ends when this process ends.

    It serves the request it is started with, then those it is sent. Start it from a thread
    that stays until it has ended.

    Args:
        interpreter: What it runs under.
        request_path: The first request.
        log_path: Its output is appended there, until a request names another log.
        placement: Where it runs.
        module: What it runs.
    """

    def __init__(
        self,
        interpreter: Interpreter,
        *,
        request_path: Path,
        log_path: Path,
        placement: Placement = HERE,
        module: str = _MODULE,
    ) -> None:
        self.interpreter = interpreter
        self.began = time.monotonic()
        self._ended = False
        self._is_launched, self._was_asked = not placement.is_child, False
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    [*placement.prefix, interpreter.python, "-P", "-m", module, str(request_path)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_environment(interpreter.python_path, placement),
                    start_new_session=True,
                )
            except OSError as error:
                raise _not_started(interpreter.python, error) from error

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, None while it runs. It does not wait."""
        return self._process.poll()

    def send(self, request_path: Path) -> None:
        """Has it serve another request; it must have served the one before.

        Raises:
            OSError: It has ended.
        """
        assert self._process.stdin is not None, "it was started with a pipe"
        self._process.stdin.write(f"{request_path}\n".encode())
        self._process.stdin.flush()

    def end_input(self) -> None:
        """Has it end by itself when it has served its requests."""
        assert self._process.stdin is not None, "it was started with a pipe"
        with contextlib.suppress(OSError):  # it has ended already
            self._process.stdin.close()

    def resident_bytes(self) -> int | None:
        """Memory that it holds now; None where the system does not say."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        except OSError:
            return None
        sizes = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
        return int(sizes[0]) * 1024 if sizes else None

    def stop(self) -> None:
        """Ends the whole process group, within seconds. Harmless when it has ended."""
        self._ask_to_end()
        self.kill()

    def kill(self) -> None:
        """Ends the whole process group at once. Harmless when it has ended.

        One that a launcher runs elsewhere may take a minute, where its node does not answer.
        """
        if self._ended:  # by now the number may be another group's
            return
        if self._is_launched:
            self._ask_to_end()
        self._signal(signal.SIGKILL)
        self._process.wait()
        self.end_input()
        self._ended = True

    def _ask_to_end(self) -> None:
        if self._was_asked or self._process.poll() is not None:
            return
        self._was_asked = True
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAUNCHER_GRACE_S if self._is_launched else _GRACE_S)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def _environment(python_path: str, placement: Placement) -> dict[str, str]:
    """Ours, without what tells our interpreter and our ranks where they belong."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _NOT_INHERITED and not name.startswith("TORCHELASTIC_")
    }
    return {
        **environment,
        "PYTHONPATH": python_path,
        "PYTHONUNBUFFERED": "1",
        **({PARENT_VARIABLE: str(os.getpid())} if placement.is_child else {}),
        **placement.environment,
    }


def _not_started(python: str, error: OSError) -> GenerationError:
    return GenerationError(
        explain(
            f"generation.python: {python}",
            found=f"could not be started ({error.strerror or error})",
            rule="the interpreter of an environment with vLLM",
            remedy="check generation.python, or make the environment again",
        )
    )
