"""train and sft: from the opponent's weights to the last optimizer step."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nemo_spin.config.iterations import at_iteration, mixed_iterations
from nemo_spin.config.schema import Config, SpinConfig
from nemo_spin.data.files import read_manifest, write_manifest
from nemo_spin.errors import CheckpointError, explain
from nemo_spin.megatron.agreement import from_first_rank
from nemo_spin.megatron.checkpoint_files import latest_checkpoint, recorded_hashes
from nemo_spin.megatron.runtime import first_rank_writes
from nemo_spin.selfplay.guarding import TrainingWatch
from nemo_spin.selfplay.ranks.context import StageContext
from nemo_spin.selfplay.run_directory import RunDirectory


def train(context: StageContext) -> None:
    """One iteration of self-play. All ranks must call."""
    _fit(context, objective="spin")


def sft(context: StageContext) -> None:
    """Plain fine-tuning on the real responses. All ranks must call."""
    _fit(context, objective="sft")


def _objective(spin: SpinConfig, iteration: int) -> dict[str, Any]:
    """The arguments of `build_objective` in one iteration."""
    return {
        "loss": spin.loss,
        "beta": float(at_iteration(spin.beta, iteration)),
        "length_normalized": spin.length_normalized,
        "label_smoothing": spin.label_smoothing,
        "sft_weight": spin.sft_weight,
        "dpop_weight": spin.dpop_weight,
        "opponent_mix": spin.opponent_mix,
    }


def _base(run: RunDirectory, spin: SpinConfig, iteration: int) -> tuple[str, ...]:
    """Where theta_0's log-probabilities of the rows of `iteration` lie; nowhere where none are needed."""
    if not spin.opponent_mix or not iteration:
        return ()
    return tuple(str(run.iteration(number).base) for number in mixed_iterations(spin, iteration))


def _with_scoring(counts: dict[str, Any], scored: Path) -> dict[str, Any]:
    """Adds pairs per second of scoring and training together: the opponent's values cost time too."""
    manifest = read_manifest(scored)
    seconds = manifest.counts.get("score_seconds") if manifest else None
    if seconds is None or not counts.get("pairs"):
        return counts
    together = counts["pairs"] / (seconds + counts["train_seconds"])
    return {**counts, "score_seconds": seconds, "pairs_per_second_with_scoring": together}


def _carried(context: StageContext) -> Path | None:
    """The checkpoint whose optimizer state this iteration starts with; None for none.

    All ranks must call.

    Raises:
        CheckpointError: The iteration before has left none.
    """
    if not context.config.model.optim.carry_over or not context.iteration:
        return None
    directory = context.run.iteration(context.iteration - 1).train / "checkpoints"
    last = from_first_rank(partial(latest_checkpoint, directory))
    if last is None:
        raise CheckpointError(
            explain(
                str(directory),
                found="holds no complete checkpoint",
                rule="model.optim.carry_over starts from the optimizer state of the iteration before",
                remedy="set model.optim.carry_over to false, or train the iteration before again",
            )
        )
    return last


def _loggers(config: Config) -> dict[str, Any]:
    """`exp_manager` as NeMo knows it; the W&B runs of all iterations are one group."""
    loggers = asdict(config.exp_manager)
    del loggers["checkpoint_callback_params"]
    loggers["wandb_logger_kwargs"] = {"group": config.name, **config.exp_manager.wandb_logger_kwargs}
    return loggers


def _fit(context: StageContext, *, objective: str) -> None:
    from nemo_spin.model.fit import fit  # 15 seconds of imports that scoring does not need
    from nemo_spin.model.settings import TrainingJob
    from nemo_spin.model.summary import summary

    config, here = context.config, context.here
    at_the_end = config.exp_manager.checkpoint_callback_params
    iteration = 0 if context.iteration is None else context.iteration
    self_play = objective == "spin"
    job = TrainingJob(
        opponent=here.opponent,
        rows=here.scored if self_play else context.run.data_dir,
        objective=objective,
        spin=_objective(config.spin, iteration) if self_play else {},
        base=_base(context.run, config.spin, iteration) if self_play else (),
        lr=float(at_iteration(config.spin.lr, iteration)) if self_play else config.sft.lr,
        epochs=int(at_iteration(config.spin.epochs, iteration)) if self_play else config.sft.epochs,
        max_steps=at_iteration(config.spin.max_steps, iteration) if self_play else config.sft.max_steps,
        seed=config.seed,
        iteration=iteration,
        model=config.model,
        precision=context.precision,
        ln2_tolerance=config.spin.gates.ln2_tolerance,
        directory=here.train,
        metrics_path=here.metrics_path,
        save_interval=config.trainer.save_interval,
        save_top_k=config.trainer.save_top_k,
        async_save=config.trainer.async_save,
        carried=_carried(context) if self_play else None,
        val_check_interval=config.trainer.val_check_interval,
        log_every_n_steps=config.trainer.log_every_n_steps,
        exp_manager=_loggers(config),
        nemo_path=here.train / "policy.nemo" if at_the_end.save_nemo_on_train_end else None,
    )
    context.phase("training")
    last = fit(
        job,
        runtime=context.runtime,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        progress=context.progress,
        started=context.started,
        watch=TrainingWatch(config, "train" if self_play else "sft", context.progress.note),
    )
    context.phase("closing")
    with first_rank_writes(context.runtime) as writes:
        if writes:
            files = [str(path.relative_to(here.train)) for path in last.rglob("*") if path.is_file()]
            write_manifest(
                here.train,
                stage="train" if self_play else "sft",
                files=files,
                inputs=context.inputs,
                counts=_with_scoring(summary(here.metrics_path), here.scored),
                hashes=recorded_hashes(last, under=here.train),  # the others wait, and it may be terabytes
            )
