"""Finds where a prompt's ids end among those of the whole conversation.

A prompt is a part of its conversation, and most of the work of tokenizing is text that is read
twice. Chat templates end every prompt with the same text, such as `<|im_start|>assistant` and a
newline, and an added token in it splits the text before anything else is done: what stands before
it becomes the same ids whatever follows, and so does what the template puts behind it.
"""

from __future__ import annotations

from typing import Any


class PromptEnds:
    """Takes the ids of prompts from those of their conversations.

    Args:
        tokenizer: A `transformers` tokenizer.
        prompt: A prompt as the chat template renders it.
    """

    def __init__(self, tokenizer: Any, prompt: str) -> None:
        self._tail = ""
        mark = _last_mark(tokenizer, prompt)
        if mark is None:
            return
        tail = prompt[prompt.rindex(mark) :]
        ids = tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]
        mark_id = tokenizer.convert_tokens_to_ids(mark)
        if ids.count(mark_id) == 1:
            behind = ids[ids.index(mark_id) + 1 :]
            self._tail, self._mark, self._mark_id, self._behind = tail, mark, mark_id, behind

    def ids(self, prompt: str, whole: str, whole_ids: list[int]) -> list[int] | None:
        """The prompt's ids; None where the prompt has to be tokenized.

        Args:
            prompt: As rendered.
            whole: The conversation, which begins with it.
            whole_ids: Of the conversation.
        """
        if not self._tail or not prompt.endswith(self._tail):
            return None
        if whole.count(self._mark) != whole_ids.count(self._mark_id):
            return None  # the id came of other text as well: which is the prompt's last is not known
        place = -1
        for _ in range(prompt.count(self._mark)):
            place = whole_ids.index(self._mark_id, place + 1)
        return [*whole_ids[: place + 1], *self._behind]


def _last_mark(tokenizer: Any, prompt: str) -> str | None:
    """The last text in a prompt that is a token wherever it stands, and leaves what is beside it alone."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    tokens = tokenizer.added_tokens_decoder.values()
    texts = [str(token.content) for token in tokens]
    marks = [
        text
        for text, token in zip(texts, tokens, strict=True)
        if text in prompt and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
    ]
    alone = [mark for mark in marks if sum(mark in text for text in texts) == 1]
    return max(alone, key=prompt.rfind, default=None)
