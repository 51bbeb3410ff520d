"""TRL's DPOTrainer on token ids that are there already, in the order of the rows; best settings for CPUs."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

_NAMES = {"prompt_ids": "prompt_ids", "real_ids": "chosen_ids", "generated_ids": "rejected_ids"}


def given_ids_trainer() -> type:
    """DPOTrainer without its tokenization and its shuffling, and silent."""
    from datasets import disable_progress_bars
    from torch.utils.data import SequentialSampler
    from transformers.utils import logging
    from trl import DPOTrainer

    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()

    class GivenIds(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    return GivenIds


def peer_rows(pairs: pa.Table) -> Any:
    """Pairs under the peer's names: a `datasets.Dataset`."""
    from datasets import Dataset

    return Dataset(pairs.select(list(_NAMES)).rename_columns(list(_NAMES.values())))


def bare_tokenizer() -> Any:
    """What the peer asks for a padding token, and nothing else."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def head_as_on_gpus() -> None:
    """Lets the peer's output layer take response tokens only, which it does where Triton runs.

    On a CPU it would take prompts and padding too, to no effect.
    """
    from trl.trainer import utils

    if hasattr(utils, "_use_triton"):
        utils._use_triton = lambda device: True
