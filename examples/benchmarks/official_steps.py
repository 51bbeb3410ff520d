"""One iteration as the official pipeline runs it: `python -m examples.benchmarks.official_steps STEP DIR`.

Each step is a process of its own, and text goes from one to the next. Written from public
interfaces alone: `generate_hf` and `generate_vllm` answer all prompts and write lines of JSON, `convert`
makes the parquet file of them, `train` runs TRL's DPOTrainer with a second model and padded batches,
and saves. DIR/settings.json says how; what a step did is written to DIR/STEP.json.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Settings = dict[str, Any]


def generate_hf(place: Path, settings: Settings) -> dict[str, Any]:
    """The answers by `transformers`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from examples.benchmarks.batched_generate import answers_of

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).eval()
    chats = _chats(settings)
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in _rendered(tokenizer, chats)]
    answers = answers_of(
        model,
        prompts,
        batch_size=settings["batch_size"],
        cache=settings["cache"],
        max_tokens=settings["max_tokens"],
        temperature=1.0,
    )
    _write_answers(place, chats, tokenizer.batch_decode(answers, skip_special_tokens=True))
    return _counts(tokenizer, answers)


def generate_vllm(place: Path, settings: Settings) -> dict[str, Any]:
    """The answers by vLLM in this process, with what is quickest for it on a CPU."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": str(settings["threads"]),
    }
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=settings["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=settings["max_model_len"],
        max_num_seqs=settings["max_num_seqs"],
        kv_cache_memory_bytes=settings["kv_cache_bytes"],
        disable_log_stats=True,
    )
    chats = _chats(settings)
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=settings["max_tokens"])
    tokenizer = engine.get_tokenizer()
    texts = _rendered(tokenizer, chats)
    outputs = [output.outputs[0] for output in engine.generate(texts, sampling, use_tqdm=False)]
    _write_answers(place, chats, [output.text for output in outputs])
    return _counts(tokenizer, [list(output.token_ids) for output in outputs])


def _chats(settings: Settings) -> list[list[dict[str, str]]]:
    lines = Path(settings["chats"]).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def _rendered(tokenizer: Any, chats: list[list[dict[str, str]]]) -> list[str]:
    return [
        tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) for chat in chats
    ]


def _write_answers(place: Path, chats: list[list[dict[str, str]]], texts: list[str]) -> None:
    with (place / "answers.jsonl").open("w", encoding="utf-8") as stream:
        for chat, text in zip(chats, texts, strict=True):
            answer = {"role": "assistant", "content": text.strip()}
            stream.write(json.dumps({"real": chat, "generated": [chat[0], answer]}) + "\n")


def _counts(tokenizer: Any, answers: list[list[int]]) -> dict[str, Any]:
    """Tokens of each answer, and those of all that are no special tokens and so become text."""
    special = set(tokenizer.all_special_ids)
    words = sum(token not in special for answer in answers for token in answer)
    return {"tokens": [len(answer) for answer in answers], "words": words}


def convert(place: Path, settings: Settings) -> dict[str, Any]:
    """The lines as one parquet file, by way of `datasets`."""
    import pyarrow.parquet as pq
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    rows = load_dataset(
        "json", data_files=str(place / "answers.jsonl"), split="train", cache_dir=str(place / "cache")
    )
    pq.write_table(rows.data.table, place / "pairs.parquet")
    return {"rows": len(rows)}


def train(place: Path, settings: Settings) -> dict[str, Any]:
    """DPOTrainer with a reference model; the model is saved at the end, and no checkpoint before."""
    import torch
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from transformers.utils import logging
    from trl import DPOConfig, DPOTrainer

    from examples.benchmarks.given_ids_trainer import head_as_on_gpus

    head_as_on_gpus()
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(settings["threads"])
    rows = load_dataset(
        "parquet", data_files=str(place / "pairs.parquet"), split="train", cache_dir=str(place / "cache")
    )
    pairs = rows.map(
        lambda row: {"prompt": row["real"][:1], "chosen": row["real"][1:], "rejected": row["generated"][1:]},
        remove_columns=rows.column_names,
    )
    size = settings["micro_batch_size"]
    arguments = DPOConfig(
        output_dir=str(place / "model"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=settings["global_batch_size"] // size,
        num_train_epochs=settings["epochs"],
        learning_rate=settings["lr"],
        lr_scheduler_type="linear",
        warmup_steps=settings["warmup_ratio"],  # below 1: a share of all steps
        optim="rmsprop",
        beta=settings["beta"],
        gradient_checkpointing=False,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32),
        args=arguments,
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    tokens = {name: sum(map(len, trainer.train_dataset[name])) for name in names}
    return {"losses": losses, **tokens}


STEPS: dict[str, Callable[[Path, Settings], dict[str, Any]]] = {
    step.__name__: step for step in (generate_hf, generate_vllm, convert, train)
}


def main(step: str, directory: str) -> None:
    """Runs one step."""
    place = Path(directory)
    settings = json.loads((place / "settings.json").read_text(encoding="utf-8"))
    done = STEPS[step](place, settings)
    (place / f"{step}.json").write_text(json.dumps(done), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
