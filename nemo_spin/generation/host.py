"""The engine in the sampler's process: started once, given other weights where it can be."""

from __future__ import annotations

import time
import traceback
from pathlib import Path

from nemo_spin.errors import GenerationError, NemoSpinError, explain
from nemo_spin.generation import status
from nemo_spin.generation.canary import TOLERANCES, Canary, check_difference, read_canary
from nemo_spin.generation.engine import Engine
from nemo_spin.generation.request import CanaryCheck, EngineSettings, GenerationRequest


def open_engine(settings: EngineSettings) -> Engine:
    """Loads the model into the engine that the request names.

    Raises:
        GenerationError: It cannot be loaded.
    """
    try:
        match settings.name:
            case "vllm":
                from nemo_spin.generation.vllm_offline import VllmOffline

                return VllmOffline(settings)
            case "vllm_server":
                from nemo_spin.generation.vllm_server import VllmServer

                return VllmServer(settings)
            case name:
                raise GenerationError(
                    explain(
                        "generation.engine", found=name, rule="vllm or vllm_server", remedy="set it to one"
                    )
                )
    except NemoSpinError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise GenerationError(
            explain(
                settings.model_dir,
                found=f"could not be loaded into {settings.name} ({describe(error)})",
                rule="a complete Hugging Face directory of a model that the engine supports",
                remedy="the log says more; see also generation.dtype, generation.kv_cache_gib and "
                "generation.tensor_parallel_size",
            )
        ) from error


class EngineHost:
    """Brings the weights of each request into one engine."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._settings: EngineSettings | None = None

    def open(self, request: GenerationRequest, steps: status.StatusWriter) -> Engine:
        """The engine with the weights that the request names, checked by its canary.

        Raises:
            GenerationError: They cannot be loaded; the engine is not to be used any more.
            GateError: The engine differs from what Megatron says about these weights.
        """
        began = time.monotonic()
        settings = request.engine
        canary = _readable(request.canary, settings)
        if self._engine is None:
            steps.step(status.LOAD, settings.model_dir)
            self._engine, before = open_engine(settings), None
            way = status.STARTED if self._engine.is_new else status.REFRESHED
        else:
            assert self._settings is not None, "an engine has settings"
            assert self._settings.fits(settings), "the parent gives an engine what it can take"
            if self._settings.model_sha256 == settings.model_sha256:
                way, before = status.KEPT, None
            else:
                steps.step(status.REFRESH, settings.weights_dir)
                way = status.REFRESHED if settings.adapter_dir is None else status.ADAPTED
                before = _refresh(self._engine, settings, canary)
        self._settings = settings
        engine = self._engine
        seconds = time.monotonic() - began
        difference = None
        if canary is not None and request.canary is not None and way != status.KEPT:
            steps.step(status.CANARY, settings.weights_dir)
            difference = _compare(engine, canary, request.canary, settings.weights_dir, before)
        steps.opened(
            status.Opened(
                way=way,
                seconds=seconds,
                device=engine.device,
                can_refresh=engine.can_refresh,
                canary_texts=0 if canary is None or difference is None else len(canary.texts),
                canary_difference=difference,
            )
        )
        return engine


def _readable(check: CanaryCheck | None, settings: EngineSettings) -> Canary | None:
    """The canary without texts that this engine cannot take; None where nothing is left."""
    canary = None if check is None else read_canary(Path(check.path))
    fitting = None if canary is None else canary.within(settings.max_model_len)
    return fitting if fitting is not None and fitting.texts else None


def _refresh(engine: Engine, settings: EngineSettings, canary: Canary | None) -> list[list[float]] | None:
    """Exchanges the weights; returns what the old ones say about the canary's texts."""
    try:
        before = None if canary is None else engine.logps(canary.token_ids())
        engine.refresh(settings)
    except NemoSpinError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise GenerationError(
            explain(
                settings.weights_dir,
                found=f"could not be loaded into the engine that was running ({describe(error)})",
                rule="an engine takes other weights of the same architecture",
                remedy="the log says more; generation.keep_engine=never starts an engine for every stage",
            )
        ) from error
    return before


def _compare(
    engine: Engine, canary: Canary, check: CanaryCheck, model_dir: str, before: list[list[float]] | None
) -> float:
    """The difference from the canary.

    Raises:
        GateError: It is too large.
        GenerationError: The numbers are exactly those of the weights before: nothing was
            exchanged. A tolerance cannot see that where a training changed little.
    """
    logps = engine.logps(canary.token_ids())
    difference = canary.difference(logps)
    tolerance = TOLERANCES[canary.precision] if check.tolerance is None else check.tolerance
    check_difference(model_dir, difference, tolerance)
    if logps == before:
        raise GenerationError(
            explain(
                model_dir,
                found="the engine says about it exactly what it said about the weights before",
                rule="an engine that was given other weights answers with them",
                remedy="generation.keep_engine=never starts an engine for every stage",
            )
        )
    return difference


def describe(error: Exception) -> str:
    """An exception's type and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
