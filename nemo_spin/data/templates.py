"""The one place where chat template, BOS and EOS are applied.

Two ways from a conversation to token ids:

* **The tokenizer's chat template.** The prompt is what the template renders for all
  messages but the last, with the generation prompt; it is tokenized once, exactly as
  `apply_chat_template` does. The response is what the template renders behind it, up to
  and including the token that ends the turn; what templates add behind that token (a
  newline, another EOS) is dropped, since no sampler ever draws it.
* **`data.prompt_template`.** The prompt is the template with `{prompt}` filled in, after
  BOS if the tokenizer puts one at the beginning of a text. The response is the answer
  and EOS.

In both, prompt and response ids are those of the whole text wherever its tokens part
between the two. Where a token would span the border (a prompt that ends in a space), the
prompt keeps the ids that the sampler gets, and the response is tokenized as what follows.

**The end token** is the first special token that the chat template puts behind an
answer: `<|im_end|>`, `<|eot_id|>`, `<end_of_turn>`, or EOS. Where the template puts none,
and with `prompt_template`, it is the tokenizer's EOS. **Stop ids** are all ids at which
an answer may end: the end token, the tokenizer's EOS and the `eos_token_id` entries of
`generation_config.json`, as in vLLM. A response holds exactly one of them, at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_spin.config.schema import DataConfig
from nemo_spin.data.inputs import prepare_inputs
from nemo_spin.data.prompt_ends import PromptEnds
from nemo_spin.data.rows import (
    EMPTY_PROMPT,
    END_IN_RESPONSE,
    NO_RESPONSE,
    SEVERAL_ROUNDS,
    TEMPLATE_REFUSED,
    Message,
    RefusedError,
    with_system_prompt,
)
from nemo_spin.data.token_ids import token_ids_of
from nemo_spin.data.tokenizer_files import (
    bad_chat_template,
    generation_eos_ids,
    load_tokenizer,
    read_chat_template,
)
from nemo_spin.errors import ConfigError, explain

__all__ = ["Encoded", "Template", "load_template", "load_tokenizer", "prepare_inputs"]

_PROBE_ANSWER = "Zebra crossing 7"


@dataclass(frozen=True)
class Encoded:
    """One conversation as token ids, and the text they stand for.

    Attributes:
        prompt_ids: What the sampler is given.
        real_ids: The human's response, ended by the end token.
        prompt_text: The prompt as rendered.
        real_text: The response as rendered, without its end token.
    """

    prompt_ids: list[int]
    real_ids: list[int]
    prompt_text: str
    real_text: str


@dataclass(frozen=True)
class _Rendered:
    """A conversation as text; `body` includes the end token's text if `closed`."""

    prompt: str
    body: str
    closed: bool


def load_template(config: DataConfig, tokenizer_dir: Path) -> Template:
    """The template that `config` and the files in `tokenizer_dir` ask for.

    Raises:
        ConfigError: The tokenizer, its chat template or `data.prompt_template` cannot be used.
    """
    return Template(
        load_tokenizer(tokenizer_dir),
        prompt_template=config.prompt_template,
        system_prompt=config.system_prompt,
        chat_template_kwargs=config.chat_template_kwargs,
        more_stop_token_ids=generation_eos_ids(tokenizer_dir),
    )


class Template:
    """Turns conversations into prompt and response ids.

    Attributes:
        end_token_id: The id that ends every response that was not cut.
        stop_token_ids: All ids at which an answer may end; generation stops at them.

    Args:
        tokenizer: As from `load_tokenizer`.
        prompt_template: Text with `{prompt}`; None: the tokenizer's chat template.
        system_prompt: Begins conversations that have no system message.
        chat_template_kwargs: Variables for the chat template.
        more_stop_token_ids: Further ids at which an answer may end.

    Raises:
        ConfigError: There is no template, or no token that could end a response.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        prompt_template: str | None = None,
        system_prompt: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        more_stop_token_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._tokenize = token_ids_of(tokenizer)
        self._tail = ""
        self._prompt_template = prompt_template
        self._ends: PromptEnds | None = None
        self._system_prompt = system_prompt
        self._kwargs = dict(chat_template_kwargs or {})
        eos = tokenizer.eos_token_id
        candidates = {*more_stop_token_ids, *([] if eos is None else [eos])}
        if prompt_template is None:
            self._chat_template = read_chat_template(tokenizer)
            end = self._turn_end(candidates)
        else:
            _check_prompt_template(prompt_template)
            end = None
        if end is None and eos is None:
            raise _no_end_token(prompt_template)
        self._template_closes = end is not None
        self.end_token_id: int = eos if end is None else end
        self.stop_token_ids: tuple[int, ...] = tuple(sorted({self.end_token_id, *candidates}))
        self._end_text = self._token_text(self.end_token_id)
        self._stop_texts = tuple(
            text for text in map(self._token_text, self.stop_token_ids) if text in self._added_tokens()
        )
        self._bos = self._bos_ids() if prompt_template is not None else []
        self._anchor_ids = self._tokenize(["\n"])[0]

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """The ids the sampler gets for a prompt: a user's text, or messages without the response.

        Raises:
            RefusedError: The template does not take these messages.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        messages = with_system_prompt(messages, self._system_prompt)
        return self._prompt_ids([self._prompt_text(messages)])[0]

    def real_ids(self, response: str, prompt: str | Sequence[Message] = "?") -> list[int]:
        """The ids of a response to `prompt`, ended by the end token.

        Raises:
            RefusedError: The template does not take these messages.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        encoded = self.encode([[*messages, {"role": "assistant", "content": response}]])[0]
        if isinstance(encoded, RefusedError):
            raise encoded
        return encoded.real_ids

    def response_text(self, ids: Sequence[int]) -> str:
        """The text of a real or generated response, without its end token."""
        body = ids[:-1] if ids and ids[-1] in self.stop_token_ids else ids
        text: str = self._tokenizer.decode(
            list(body), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def prompt_text(self, ids: Sequence[int]) -> str:
        """The text of a prompt's ids."""
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def cut_left(self, prompt_ids: Sequence[int], length: int) -> list[int]:
        """The last `length` ids of a prompt, its BOS kept."""
        bos = self._tokenizer.bos_token_id
        if length > 1 and bos is not None and prompt_ids[0] == bos:
            return [bos, *prompt_ids[len(prompt_ids) - length + 1 :]]
        return list(prompt_ids[len(prompt_ids) - length :])

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded | RefusedError]:
        """Renders and tokenizes conversations whose last message is the response.

        A conversation that cannot be encoded gives the refusal, in its place.
        """
        rendered = [self._render_or_refuse(list(messages)) for messages in conversations]
        good = [item for item in rendered if isinstance(item, _Rendered)]
        encoded = iter(self._ids(good))
        return [
            item if isinstance(item, RefusedError) else self._finish(item, *next(encoded))
            for item in rendered
        ]

    # From messages to text.

    def _render_or_refuse(self, messages: list[Message]) -> _Rendered | RefusedError:
        try:
            return self._render(with_system_prompt(messages, self._system_prompt))
        except RefusedError as refusal:
            return refusal

    def _render(self, messages: list[Message]) -> _Rendered:
        response = messages[-1]["content"]
        while stop := next((text for text in self._stop_texts if response.rstrip().endswith(text)), None):
            response = response.rstrip().removesuffix(stop)
        if not response.strip():
            raise RefusedError(NO_RESPONSE, "nothing but the end token")
        if any(text in response for text in self._stop_texts):
            raise RefusedError(END_IN_RESPONSE)
        prompt = self._prompt_text(messages[:-1])
        if self._prompt_template is not None:
            return _Rendered(prompt, response, closed=False)
        text = self._apply([*messages[:-1], {**messages[-1], "content": response}], generation_prompt=False)
        if text.startswith(prompt):
            body = text[len(prompt) :]
        else:
            # A generation prompt that the rendered turn does not have, such as an opened <think>.
            start = text.rfind(response.strip(), 0, len(text.removesuffix(self._tail)))
            if start < 0:
                raise RefusedError(TEMPLATE_REFUSED, "it does not render the response as it is")
            body = text[start:]
        end = body.find(self._end_text) if self._template_closes else -1
        if end < 0:
            return _Rendered(prompt, body.rstrip(), closed=False)
        return _Rendered(prompt, body[: end + len(self._end_text)], closed=True)

    def _prompt_text(self, messages: Sequence[Message]) -> str:
        if self._prompt_template is None:
            return self._apply(messages, generation_prompt=True)
        texts = [message["content"] for message in messages]
        if len([message for message in messages if message["role"] != "system"]) > 1:
            raise RefusedError(SEVERAL_ROUNDS, "data.first_round_only keeps the first one")
        return self._prompt_template.replace("{prompt}", "\n\n".join(texts))

    def _apply(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """Renders the chat template, in the sandbox of `transformers`."""
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self._kwargs,
            )
        except Exception as error:  # a template may do anything to a message that it does not expect
            detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RefusedError(TEMPLATE_REFUSED, detail[:200]) from error
        return text

    # From text to ids.

    def _prompt_ids(self, prompts: list[str]) -> list[list[int]]:
        bos = self._bos
        return [ids if ids[:1] == bos else [*bos, *ids] for ids in self._tokenize(prompts)]

    def _ids(self, rendered: list[_Rendered]) -> Iterable[tuple[list[int], list[int]]]:
        """Ids of the prompts, and of the bodies as they follow these."""
        wholes = self._prompt_ids([item.prompt + item.body for item in rendered])
        prompts = self._prompts_of(rendered, wholes)
        bodies = [
            whole[len(prompt) :] if whole[: len(prompt)] == prompt else None
            for whole, prompt in zip(wholes, prompts, strict=True)
        ]
        spanned = [item.body for item, body in zip(rendered, bodies, strict=True) if body is None]
        following = iter(self._continuations(spanned))
        complete = [next(following) if body is None else body for body in bodies]
        responses = (
            body if item.closed else [*body, self.end_token_id]
            for item, body in zip(rendered, complete, strict=True)
        )
        return zip(prompts, responses, strict=True)

    def _prompts_of(self, rendered: list[_Rendered], wholes: list[list[int]]) -> list[list[int]]:
        """Ids of the prompts; tokenizes those that cannot be taken from the ids of the whole."""
        found = [
            self._ends.ids(item.prompt, item.prompt + item.body, whole) if self._ends else None
            for item, whole in zip(rendered, wholes, strict=True)
        ]
        missing = [item.prompt for item, ids in zip(rendered, found, strict=True) if ids is None]
        tokenized = iter(self._prompt_ids(missing))
        return [next(tokenized) if ids is None else ids for ids in found]

    def _continuations(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that follow other text.

        Tokenizers in the way of SentencePiece put a space before the beginning of a text;
        behind a line break they do not.
        """
        anchored = self._tokenize(["\n" + text for text in texts])
        alone = self._tokenize(texts)
        lead = len(self._anchor_ids)
        return [
            long[lead:] if long[:lead] == self._anchor_ids else short
            for long, short in zip(anchored, alone, strict=True)
        ]

    def _finish(self, item: _Rendered, prompt_ids: list[int], real_ids: list[int]) -> Encoded | RefusedError:
        if not prompt_ids:
            return RefusedError(EMPTY_PROMPT)
        stops = sum(token in self.stop_token_ids for token in real_ids)
        if stops != 1 or real_ids[-1] != self.end_token_id or len(real_ids) < 2:
            return RefusedError(END_IN_RESPONSE)
        text = item.body.removesuffix(self._end_text) if item.closed else item.body
        return Encoded(prompt_ids, real_ids, item.prompt, text)

    # What tokenizer and template are like, found out once.

    def _turn_end(self, candidates: set[int]) -> int | None:
        """The first special token of the tail that the chat template puts behind an answer."""
        question = {"role": "user", "content": "Where do stripes meet?"}
        try:
            prompt = self._apply([question], generation_prompt=True)
            text = self._apply(
                [question, {"role": "assistant", "content": _PROBE_ANSWER}], generation_prompt=False
            )
        except RefusedError as refusal:
            raise bad_chat_template(str(refusal)) from refusal
        if not prompt.strip() or _PROBE_ANSWER not in text:
            raise bad_chat_template("it does not render one question and its answer")
        self._ends = PromptEnds(self._tokenizer, prompt)
        self._tail = tail = text[text.rfind(_PROBE_ANSWER) + len(_PROBE_ANSWER) :]
        special = {*candidates, *self._tokenizer.all_special_ids}
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        special |= {token for token, entry in added.items() if getattr(entry, "special", False)}
        return next((token for token in self._tokenize([tail])[0] if token in special), None)

    def _bos_ids(self) -> list[int]:
        """BOS, if the tokenizer puts it before a text on its own."""
        bos = self._tokenizer.bos_token_id
        ids = self._tokenizer("a", verbose=False)["input_ids"]
        return [bos] if bos is not None and ids[:1] == [bos] else []

    def _token_text(self, token: int) -> str:
        text: str = self._tokenizer.convert_ids_to_tokens(token) or ""
        return text

    def _added_tokens(self) -> set[str]:
        return {str(text) for text in getattr(self._tokenizer, "added_tokens_encoder", {})}


def _check_prompt_template(prompt_template: str) -> None:
    if prompt_template.count("{prompt}") != 1:
        raise ConfigError(
            explain(
                f"data.prompt_template={prompt_template!r}",
                found=f"has {prompt_template.count('{prompt}')} times {{prompt}}",
                rule="the text around the prompt, with {prompt} once in its place",
                remedy=r'write it like "### Instruction: {prompt}\n\n### Response: "',
            )
        )


def _no_end_token(prompt_template: str | None) -> ConfigError:
    return ConfigError(
        explain(
            "model.path",
            found="its tokenizer has no eos_token"
            + ("" if prompt_template else " and its chat template puts no special token behind an answer"),
            rule="every response ends with a token at which generation stops",
            remedy="set eos_token in tokenizer_config.json",
        )
    )
