"""Saves and restores .nemo files under model parallelism.

A .nemo of this package holds `model_config.yaml` (NeMo's name), the weights as a Megatron
distributed checkpoint (`model_weights/`), and what a Hugging Face directory has beside weights:
configuration, tokenizer and chat template (`hf/`). Optimizer state is not part of it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from omegaconf import DictConfig, OmegaConf

from nemo_spin.bridge.companions import copy_companions
from nemo_spin.config.schema import ModelConfig
from nemo_spin.errors import CheckpointError, ConfigError, explain
from nemo_spin.megatron.runtime import Runtime, first_rank_writes
from nemo_spin.megatron.sharded_weights import load_sharded_weights, save_sharded_weights
from nemo_spin.model.nemo_archive import pack, unpacked
from nemo_spin.model.settings import TrainingJob

_WEIGHTS, _COMPANIONS = "model_weights", "hf"
_TARGET = "nemo_spin.model.spin_model.MegatronGPTSPINModel"
_STORED_DTYPES = {"32": "F32", "bf16": "BF16"}
_PATHS = (  # mean nothing on another machine
    "opponent",
    "rows",
    "directory",
    "metrics_path",
    "nemo_path",
    "carried",
)
# Of the pipeline's cut; another number of stages is cut evenly.
_CUT = {
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}


class MegatronSaveRestoreConnector(SaveRestoreConnector):
    """NeMo's connector for models that are spread over ranks. All ranks must call its methods.

    Args:
        runtime: This rank's place, for `restore_from`; the trainer's strategy has it too.
    """

    def __init__(self, runtime: Runtime | None = None) -> None:
        super().__init__()
        self._runtime = runtime

    def save_to(self, model: Any, save_path: str) -> None:
        """Writes the archive, or, with `pack_nemo_file` off, its files into the directory of `save_path`.

        Every rank writes its share of the weights beside `save_path`, which must be storage that all
        nodes see; the first rank packs.

        Raises:
            ConfigError: The model has adapters.
            DataError: The disk is full. What lay at `save_path` is unharmed.
        """
        assert model.engine is not None, "the model is built before it is saved"
        if model.job.model.lora.rank is not None:
            raise ConfigError(
                explain(
                    str(save_path),
                    found=f"the model has adapters of rank {model.job.model.lora.rank}",
                    rule="a .nemo file holds a whole model, and adapters are merged when it is exported",
                    remedy="use the merged model that `nemo-spin export` writes",
                )
            )
        target = Path(save_path)
        parts = target.with_name(f".{target.name}.parts.partial")
        with first_rank_writes(model.runtime) as writes:
            if writes:
                shutil.rmtree(parts, ignore_errors=True)
                (parts / _WEIGHTS).mkdir(parents=True)
                (parts / _COMPANIONS).mkdir()
                OmegaConf.save(_config_of(model), parts / self.model_config_yaml)
                dtype = _STORED_DTYPES[model.job.precision]
                copy_companions(model.job.opponent, parts / _COMPANIONS, dtype=dtype)
        save_sharded_weights(model.engine.chunks, parts / _WEIGHTS)
        with first_rank_writes(model.runtime) as writes:
            if writes:
                if self.pack_nemo_file:
                    pack(parts, target)
                    shutil.rmtree(parts)
                else:
                    _move(parts, target.parent)

    def restore_from(
        self,
        calling_cls: Any,
        restore_path: str,
        override_config_path: DictConfig | str | None = None,
        map_location: Any = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Any = None,
        validate_access_integrity: bool = True,
    ) -> Any:
        """A model with the archive's weights at the layout of the process groups, whatever it was saved at.

        Args:
            calling_cls: The model's class.
            restore_path: The .nemo file, or a directory with its files.
            override_config_path: Replaces the archive's configuration (NeMo's meaning): a mapping or a
                YAML file. One with `job.rows` can be trained on.
            map_location, strict, validate_access_integrity: NeMo's; weights are always complete and
                go where Megatron puts them.
            return_config: Only the configuration; no process groups are needed.
            trainer: Lightning's, whose `MegatronStrategy` knows the process groups.

        Raises:
            CheckpointError: The archive is damaged, unsafe or of another model.
            ConfigError: Nobody knows the process groups, or the configuration is not one of ours.
        """
        source = Path(self.model_extracted_dir or restore_path)
        override = override_config_path
        if isinstance(override, str):
            override = _load(Path(override))
        if return_config:
            return override if override is not None else _read_config(source, self.model_config_yaml)
        runtime = self._runtime or getattr(getattr(trainer, "strategy", None), "runtime", None)
        if runtime is None:
            raise _no_runtime(source)
        with unpacked(source) as directory:
            config = override if override is not None else _load(directory / self.model_config_yaml)
            companions = tempfile.TemporaryDirectory(prefix="nemo-hf-")
            shutil.copytree(directory / _COMPANIONS, companions.name, dirs_exist_ok=True)
            job = _job_of(config, opponent=Path(companions.name), runtime=runtime)
            model = calling_cls(job, runtime, trainer)
            model.build(lambda chunks, _: load_sharded_weights(chunks, directory / _WEIGHTS))
        model.companions = companions  # tokenizer files live as long as the model
        return model


def _config_of(model: Any) -> DictConfig:
    job = {name: value for name, value in model.job.as_plain().items() if name not in _PATHS}
    return OmegaConf.create({"target": _TARGET, "nemo_version": model.cfg.nemo_version, "job": job})


def _job_of(config: DictConfig, *, opponent: Path, runtime: Runtime) -> TrainingJob:
    """The job of a configuration, at the layout of `runtime`."""
    plain = OmegaConf.to_container(config, resolve=True)
    values = plain.get("job") if isinstance(plain, Mapping) else None
    known = {field.name for field in fields(TrainingJob)}
    if not isinstance(values, Mapping) or set(values) - known:
        raise ConfigError(
            explain(
                "the configuration of the .nemo file",
                found="is not one of a MegatronGPTSPINModel",
                rule="`job` with the fields of nemo_spin.model.settings.TrainingJob",
                remedy="restore a file that this class has saved; change what `return_config=True` gives",
            )
        )
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values["model"]))
    assert isinstance(model, ModelConfig), "OmegaConf gives the class of its schema"
    paths = {name: Path(values[name]) for name in _PATHS if values.get(name) is not None}
    defaults = {
        "rows": None,
        "carried": None,
        "directory": Path("train"),
        "metrics_path": Path("metrics.jsonl"),
    }
    rest = {name: value for name, value in values.items() if name not in (*_PATHS, "model")}
    return TrainingJob(
        **{**defaults, **paths, **rest, "opponent": opponent, "model": _at_layout(model, runtime)}
    )


def _at_layout(model: ModelConfig, runtime: Runtime) -> ModelConfig:
    cut: dict[str, Any] = {} if runtime.pp_size == model.pipeline_model_parallel_size else _CUT
    return replace(
        model,
        tensor_model_parallel_size=runtime.tp_size,
        pipeline_model_parallel_size=runtime.pp_size,
        virtual_pipeline_model_parallel_size=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        context_parallel_size=runtime.cp_size,
        sequence_parallel=model.sequence_parallel and runtime.tp_size > 1,
        **cut,
    )


def _read_config(source: Path, name: str) -> DictConfig:
    """Only the configuration, of an archive or a directory, in this process alone."""
    if source.is_dir():
        return _load(source / name)
    with tempfile.TemporaryDirectory() as temporary:
        members = SaveRestoreConnector._filtered_tar_info(str(source), lambda member: member.endswith(name))
        SaveRestoreConnector._unpack_nemo_file(str(source), temporary, members)
        return _load(Path(temporary) / name)


def _load(path: Path) -> DictConfig:
    if not path.is_file():
        raise CheckpointError(
            explain(
                str(path),
                found="there is no such file",
                rule="a .nemo file holds its configuration",
                remedy="restore a file that MegatronGPTSPINModel.save_to has written",
            )
        )
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig), "a mapping is written"
    return config


def _move(parts: Path, directory: Path) -> None:
    """Moves the files to where they belong, replacing what an earlier call has left."""
    for path in parts.iterdir():
        old = directory / path.name
        if old.is_dir():
            shutil.rmtree(old)
        path.replace(old)
    parts.rmdir()


def _no_runtime(source: Path) -> ConfigError:
    return ConfigError(
        explain(
            f"restore_from({source})",
            found="neither a trainer with a MegatronStrategy nor process groups",
            rule="weights are restored at the layout of the process groups that all ranks have joined",
            remedy="pass trainer=..., or save_restore_connector=MegatronSaveRestoreConnector("
            "runtime=nemo_spin.megatron.runtime.initialize(...))",
        )
    )
