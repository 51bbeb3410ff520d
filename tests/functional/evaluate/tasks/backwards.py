"""The questions of the tasks in this directory: words to be said backwards, one of three answers is right."""

import random
from typing import Any

WORDS = ("red", "green", "blue", "seven", "horse", "river", "stone", "cloud", "apple", "wheel")


def rows(count: int = 12) -> list[dict[str, Any]]:
    chance = random.Random(5)
    made = []
    for _ in range(count):
        words = chance.sample(WORDS, 3)
        choices = [" ".join(chance.sample(words, 3)) for _ in range(2)]
        right = chance.randrange(3)
        choices.insert(right, " ".join(reversed(words)))
        made.append({"prompt": f"Say backwards: {' '.join(words)}", "choices": choices, "right": right})
    return made


def questions(**_: Any) -> dict[str, Any]:
    """Splits as `datasets` has them; nothing is downloaded."""
    from datasets import Dataset

    return {"test": Dataset.from_list(rows()), "train": Dataset.from_list(rows()[:4])}
