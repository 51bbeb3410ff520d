"""The loop: runs the stages that are not done, in order, whatever was killed before.

What is done is decided by the manifests alone. Before anything is started, everything
that lies in the run directory is compared with what today's configuration would make.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_spin.config.load import read_yaml, to_yaml
from nemo_spin.config.schema import Config
from nemo_spin.data.files import Manifest, remove_partials, write_text
from nemo_spin.errors import (
    TRY_LATER,
    ConfigError,
    GuardError,
    NemoSpinError,
    PreemptedError,
    StageError,
    explain,
)
from nemo_spin.selfplay import state as states
from nemo_spin.selfplay.faults import worth_another_try
from nemo_spin.selfplay.guarding import after_failure, described, error_of, findings_of, record
from nemo_spin.selfplay.inputs import config_differences
from nemo_spin.selfplay.keep import Candidate, candidates, describe_scores, keep_model
from nemo_spin.selfplay.launcher import Launcher
from nemo_spin.selfplay.lock import locked
from nemo_spin.selfplay.preflight import check_model, find_model
from nemo_spin.selfplay.reporting import refresh
from nemo_spin.selfplay.run_directory import RunDirectory
from nemo_spin.selfplay.screen import Screen
from nemo_spin.selfplay.signals import STOPPED, stop_on_signals, undisturbed
from nemo_spin.selfplay.stages import Context, Stage, sft_stages, spin_stages, stage_of_command
from nemo_spin.selfplay.state import StateFile
from nemo_spin.selfplay.storage import storage_error
from nemo_spin.selfplay.survey import refuse_other_inputs
from nemo_spin.selfplay.verified import Verified

_SIGN_OF_LIFE_S = 5.0
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
_FRUITLESS_STARTS = 3  # in a row, and
_FRUITLESS_S = 2 * 3600.0  # together: what has not passed by then needs a person


def run(config: Config, *, launcher: Launcher, screen: Screen) -> None:
    """Runs self-play to its end: all stages of all iterations that are not done.

    Raises:
        NemoSpinError: What stopped it. The same command goes on from there.
    """
    from nemo_spin.selfplay.tables import show_iteration, show_run

    with _open(config, Path(config.run_dir), launcher=launcher, screen=screen) as session:
        stages = spin_stages(session.context)
        session.begin(stages)
        try:
            for index, stage in enumerate(stages):
                was_run = session.do(stage)
                if was_run and _ends_iteration(stages, index):
                    show_iteration(screen, session.context.run, stage.iteration or 0)
                    session.keep()
                if index + 1 < len(stages):  # behind the last there is nothing to stop
                    session.stop_at_guards(stage)
        except GuardError:
            session.show_kept()
            session.refresh_report()
            raise
        session.state.finished()
        show_run(screen, session.context.run)
        session.show_kept()


def run_stage(
    config: Config, stage: str, *, iteration: int | None, launcher: Launcher, screen: Screen
) -> None:
    """Runs one stage of one iteration; what it consumes must be done.

    Args:
        config: The configuration.
        stage: prepare | generate | score | train | export | evaluate | import-hf.
        iteration: From 0; None: the first in which the stage is not done.
        launcher: Starts ranks.
        screen: Shows what happens.

    Raises:
        NemoSpinError: What stopped it.
    """
    with _open(config, Path(config.run_dir), launcher=launcher, screen=screen) as session:
        chosen = stage_of_command(session.context, stage, iteration)
        if chosen.of_the_loop:
            refuse_other_inputs(spin_stages(session.context))
        session.begin([chosen])
        session.do(chosen)


def run_sft(config: Config, *, launcher: Launcher, screen: Screen) -> None:
    """Fine-tunes `model.path` on the real responses, into the run directory `sft.output`.

    Raises:
        NemoSpinError: What stopped it. The same command goes on from there.
    """
    with _open(config, Path(config.sft.output), launcher=launcher, screen=screen) as session:
        stages = sft_stages(session.context)
        session.begin(stages)
        for stage in stages:
            session.do(stage)
        session.state.finished()


def _ends_iteration(stages: Sequence[Stage], index: int) -> bool:
    following = stages[index + 1].iteration if index + 1 < len(stages) else None
    return stages[index].iteration is not None and following != stages[index].iteration


@contextlib.contextmanager
def _open(config: Config, path: Path, *, launcher: Launcher, screen: Screen) -> Iterator[Session]:
    """Checks the model, locks the run directory, and gives what stages need."""
    with stop_on_signals():
        theta_0 = find_model(config.model.path)
        check_model(config, theta_0)
        run_directory = RunDirectory(path.expanduser().absolute())
        _make(run_directory.path)
        with locked(run_directory.lock_path, on_wait=screen.note):
            remove_partials(run_directory.path)
            context = Context(
                config=config,
                run=run_directory,
                launcher=launcher,
                verified=Verified(run_directory.verified_path),
                theta_0=theta_0,
            )
            session = Session(context, screen)
            try:
                yield session
            except Exception as error:
                if not session.may_go_well_later(error):
                    raise
                if isinstance(error, NemoSpinError):
                    error.exit_code = TRY_LATER
                    raise
                passing = StageError(repr(error))
                passing.exit_code = TRY_LATER
                raise passing from error
            finally:
                with undisturbed():
                    context.keeper.close()
            session.state.left()
            if session.has_run:
                session.refresh_report()  # it has ended: the report says so too


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            explain(
                f"run_dir={path}",
                found=f"cannot be made ({error.strerror or error})",
                rule="a directory that is there or can be made",
                remedy="choose another place, or mend its permissions",
            )
        ) from error


class Session:
    """One command at work on a run directory.

    Args:
        context: What stages are given.
        screen: Shows what happens.
    """

    def __init__(self, context: Context, screen: Screen) -> None:
        self.context = context
        self.state = StateFile(context.run.state_path)
        self.has_run = False
        self._screen = screen

    def begin(self, stages: Sequence[Stage]) -> None:
        """Checks whatever can be checked now, then makes the configuration the run's.

        Raises:
            NemoSpinError: Something cannot go well; nothing was changed.
        """
        refuse_other_inputs(stages)
        for stage in stages:
            if stage.manifest() is None:
                stage.check()
        self._write_config()

    def _write_config(self) -> None:
        """Makes config.yaml today's configuration, saying what changed since the last start."""
        path = self.context.run.config_path
        text = to_yaml(self.context.config)
        if path.exists():
            if path.read_bytes() == text.encode():
                return
            with contextlib.suppress(ConfigError):  # it cannot be read: nothing to compare with
                for line in config_differences(read_yaml(path), self.context.config):
                    self._screen.note(f"config.yaml: {line}")
        write_text(path, text)

    def do(self, stage: Stage) -> bool:
        """Runs a stage unless it is done; returns whether it ran.

        Raises:
            NemoSpinError: It failed.
        """
        refuse_other_inputs([stage])
        done = stage.manifest()
        if done is not None:
            stage.publish(done)
            self.state.found_done(stage.name, stage.iteration)
            return False
        manifest = self._do_in_attempts(stage)
        self.has_run = True
        findings = findings_of(stage, manifest)
        record(stage, findings)
        for finding in findings:
            if finding.step is None:  # those of steps were shown while it trained
                self._screen.note(described(finding))
        self.refresh_report()
        return True

    def _do_in_attempts(self, stage: Stage) -> Manifest:
        """Runs a stage; again, after a while, where it failed by something that may pass.

        Attempts count from the last one that left a new checkpoint or shard.

        Raises:
            NemoSpinError: It failed, `launcher.attempts` times or for good.
        """
        launcher = self.context.config.launcher
        failed = 0
        while True:
            before = stage.saved()
            try:
                return self._attempt(stage)
            except Exception as error:
                failed += 1
                if stage.saved() - before:
                    failed = 1
                    self.state.advanced()
                what = worth_another_try(error)
                if what is None or failed >= launcher.attempts:
                    raise
                wait_s = launcher.backoff_s * 2.0 ** (failed - 1)
                self._screen.note(
                    f"{stage.label} failed ({what}): attempt {failed + 1} of {launcher.attempts} "
                    f"in {wait_s:g} s\n{error}"
                )
                self._wait(wait_s)

    def _wait(self, seconds: float) -> None:
        try:
            time.sleep(seconds)
        except STOPPED as stopped:
            self.state.ended(states.INTERRUPTED, repr(stopped))  # not failed: it was to be done again
            raise

    def _attempt(self, stage: Stage) -> Manifest:
        inputs = stage.inputs()
        self.state.started(stage.name, stage.iteration)
        with self._screen.stage(stage.label):
            try:
                manifest = self._run(stage, inputs)
            except STOPPED as stopped:
                said = str(stopped) if isinstance(stopped, PreemptedError) else repr(stopped)
                self.state.ended(states.INTERRUPTED, said)
                raise
            except Exception as error:
                if isinstance(error, GuardError):
                    after_failure(stage)
                known = isinstance(error, NemoSpinError)
                self.state.ended(states.FAILED, str(error) if known else repr(error))
                raise
            stage.publish(manifest)
            self.state.ended(states.DONE)
            self._screen.result(stage.describe(manifest))
        return manifest

    def may_go_well_later(self, error: Exception) -> bool:
        """Whether what ended the command may have passed by its next start, and there were not too many."""
        what = worth_another_try(error)
        if what is None:
            return False
        try:
            again = self.state.came_to_nothing(starts=_FRUITLESS_STARTS, within_s=_FRUITLESS_S)
        except NemoSpinError as unwritten:  # cannot be counted: by the same file system?
            again = worth_another_try(unwritten) is not None
        self._screen.note(
            f"it may go well later ({what}): exit code {TRY_LATER}, start the same command again"
            if again
            else f"too many starts in a row came to nothing ({what}): look at what fails"
        )
        return again

    def stop_at_guards(self, stage: Stage) -> None:
        """Ends the loop where a guard over a finished stage says so, also one found done.

        Raises:
            GuardError: It does.
        """
        manifest = stage.manifest()
        assert manifest is not None, f"{stage.label} is done"
        error = error_of(self.context.config, stage.label, findings_of(stage, manifest))
        if error is not None:
            self.state.stopped(str(error))
            raise error

    def keep(self) -> tuple[Candidate, str]:
        """Makes `kept` point at the model that `selfplay.keep` chooses."""
        return keep_model(self.context.run, self.context.theta_0, self.context.config.selfplay.keep)

    def show_kept(self) -> None:
        """Says which model that is, where, and how it scores."""
        chosen, what = self.keep()
        path = self.context.run.kept
        self._screen.show(f"  kept: {chosen.name} ({self.context.config.selfplay.keep}: {what}), {path}")
        scores = describe_scores(chosen, candidates(self.context.run, self.context.theta_0))
        if scores is not None:
            self._screen.show(f"  its held-out scores: {scores}")

    def refresh_report(self) -> None:
        """Writes report.html anew; a failure is a warning."""
        refresh(self.context.run, warn=self._screen.note)

    def _run(self, stage: Stage, inputs: dict[str, Any]) -> Manifest:
        try:
            stage.prepare_directory(inputs)
            stage.run(_SignsOfLife(self._screen, self.state))
        except OSError as error:
            if error.errno not in _STORAGE:
                raise
            raise storage_error(stage.directory, error) from error
        manifest = self.context.verified.trust(stage.directory)
        assert manifest is not None, f"{stage.label} ended without a manifest"
        assert manifest.inputs == inputs, f"{stage.label} wrote other inputs into its manifest"
        return manifest


@dataclass
class _SignsOfLife:
    """A stage's progress: on the screen, and now and then in state.json."""

    screen: Screen
    state: StateFile
    last: float = 0.0

    def update(self, done: int, total: int, unit: str, **values: Any) -> None:
        """See `Progress.update`."""
        self.screen.update(done, total, unit, **values)
        if time.monotonic() - self.last > _SIGN_OF_LIFE_S:
            self.last = time.monotonic()
            self.state.alive()

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        self.screen.note(text)
