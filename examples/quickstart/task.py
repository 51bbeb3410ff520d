"""A small verifiable task: instructions in English with exactly one right answer.

Six letters are to be put into alphabetical order, into reverse alphabetical order, or
read backwards; each kind of instruction comes in several wordings. Everything follows
from the seed, nothing is downloaded.

Usage: `python task.py OUT_DIR` writes three files with one chat per line:

- `pretrain.jsonl`: unreliable text to learn the language from; in half of the answers two
  letters have changed places;
- `train.jsonl`: the demonstrations, all of them right;
- `heldout.jsonl`: instructions that occur in neither.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

LETTERS = "abcdefghijklmnopqrst"
NUM_LETTERS = 6

WORDINGS = {
    "ascending": (
        "Sort these letters alphabetically: {letters}",
        "Put the letters {letters} into alphabetical order.",
        "What is the alphabetical order of {letters}?",
        "Please arrange {letters} from first to last in the alphabet.",
    ),
    "descending": (
        "Sort these letters in reverse alphabetical order: {letters}",
        "Put the letters {letters} into descending order.",
        "Please arrange {letters} from last to first in the alphabet.",
    ),
    "backwards": (
        "Read these letters backwards: {letters}",
        "Write the letters {letters} in the opposite order.",
        "What do you get if you reverse {letters}?",
    ),
}


def answer(kind: str, letters: list[str]) -> list[str]:
    """The one right order of `letters` for this kind of instruction."""
    if kind == "backwards":
        return letters[::-1]
    return sorted(letters, reverse=kind == "descending")


def instructions(seed: int) -> Iterator[tuple[str, str]]:
    """Endless different (instruction, answer) pairs; the same ones for the same seed."""
    generator = random.Random(seed)
    seen: set[tuple[str, str]] = set()
    while True:
        kind = generator.choice(sorted(WORDINGS))
        letters = generator.sample(LETTERS, NUM_LETTERS)
        if (kind, "".join(letters)) in seen:
            continue
        seen.add((kind, "".join(letters)))
        wording = generator.choice(WORDINGS[kind])
        yield wording.format(letters=" ".join(letters)), " ".join(answer(kind, letters))


def careless(response: str, generator: random.Random, share: float) -> str:
    """`response` with two letters exchanged, in this share of the cases."""
    letters = response.split()
    if generator.random() < share:
        first, second = generator.sample(range(len(letters)), 2)
        letters[first], letters[second] = letters[second], letters[first]
    return " ".join(letters)


def write_chats(path: Path, pairs: list[tuple[str, str]]) -> None:
    """One JSON object with `id` and `messages` per line."""
    with path.open("w", encoding="utf-8") as stream:
        for number, (instruction, response) in enumerate(pairs):
            messages = [
                {"role": "user", "content": instruction},
                {"role": "assistant", "content": response},
            ]
            stream.write(json.dumps({"id": f"{path.stem}-{number:06d}", "messages": messages}) + "\n")


SPLITS = ("heldout", "train", "pretrain")


def write_task(out_dir: Path, numbers: dict[str, int], *, mistakes: float, seed: int) -> None:
    """Writes a file of `numbers[split]` chats for every split; no instruction is in two of them.

    Args:
        out_dir: Where they go.
        numbers: Chats of each of `SPLITS`.
        mistakes: Share of `pretrain` that is wrong.
        seed: Everything follows from it.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    source = instructions(seed)
    for split in SPLITS:
        pairs = list(itertools.islice(source, numbers[split]))
        if split == "pretrain":
            generator = random.Random(seed)
            pairs = [(prompt, careless(text, generator, mistakes)) for prompt, text in pairs]
        write_chats(out_dir / f"{split}.jsonl", pairs)


def main() -> None:
    """Writes all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--pretrain", type=int, default=51_200, help="number of unreliable chats")
    parser.add_argument("--mistakes", type=float, default=0.5, help="share of them that is wrong")
    parser.add_argument("--train", type=int, default=1024, help="number of demonstrations")
    parser.add_argument("--heldout", type=int, default=512, help="number of held-out prompts")
    parser.add_argument("--seed", type=int, default=1234)
    arguments = parser.parse_args()

    numbers = {split: getattr(arguments, split) for split in SPLITS}
    write_task(arguments.out_dir, numbers, mistakes=arguments.mistakes, seed=arguments.seed)


if __name__ == "__main__":
    main()
