"""Splits JSONL files and JSON arrays into records without holding the file.

Records are not checked here beyond what finding their ends takes.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from nemo_spin.errors import DataError, explain

_CHUNK_BYTES = 1 << 20
MAX_RECORD_BYTES = 256 << 20
_BOM = codecs.BOM_UTF8
_SPACE = " \t\r\n"


class Record(NamedTuple):
    """One element of a JSON file.

    Attributes:
        number: Its place from 0; in a JSONL file that of its line.
        text: Its bytes.
        position: Bytes of the file read so far, for a progress bar.
    """

    number: int
    text: bytes
    position: int


def is_array(stream: IO[bytes]) -> bool:
    """Whether the file begins with `[`: one array, not one object a line."""
    peeked = b""
    while not peeked:
        raw = stream.peek(1) if hasattr(stream, "peek") else b""
        if not raw:
            return False
        peeked = raw.removeprefix(_BOM).lstrip()
        if not peeked:
            stream.read(len(raw))
    return peeked.startswith(b"[")


def read_lines(stream: IO[bytes], tell: Callable[[], int]) -> Iterator[Record]:
    """Yields the lines of a JSONL file that hold anything."""
    number = -1
    while line := stream.readline(MAX_RECORD_BYTES):
        number += 1
        if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
            raise _too_long(f"line {number + 1}")
        text = (line.removeprefix(_BOM) if number == 0 else line).strip()
        if text:
            yield Record(number, text, tell())


def read_array(stream: IO[bytes], tell: Callable[[], int]) -> Iterator[Record]:
    """Yields the elements of the one array of a JSON file.

    Bytes that are not UTF-8 stay as they are inside their element.

    Raises:
        DataError: The array is cut short, or no JSON: where the next element would
            begin cannot be known.
    """
    text = _Window(stream)
    text.skip("\ufeff" + _SPACE)
    text.take("[", 0)
    number = 0
    text.skip(_SPACE)
    if text.peek() != "]":
        while True:
            element = text.element(number)
            yield Record(number, element.encode("utf-8", "surrogateescape"), tell())
            number += 1
            text.skip(_SPACE)
            if text.peek() == "]":
                break
            text.take(",", number)
            text.skip(_SPACE)
    text.take("]", number)
    text.skip(_SPACE)
    if text.peek():
        raise _broken(number, "there is text behind the array's end")


class _Window:
    """The part of a text file that is being looked at."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._text = ""
        self._place = 0
        self._ended = False
        self._scan = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character, or nothing at the end of the file."""
        while self._place >= len(self._text) and not self._ended:
            self._more()
        return self._text[self._place : self._place + 1]

    def skip(self, characters: str) -> None:
        while (character := self.peek()) and character in characters:
            self._place += 1

    def take(self, character: str, number: int) -> None:
        if self.peek() != character:
            raise _broken(number, f"`{character}` expected, {self.peek() or 'the end of the file'!r} found")
        self._place += 1

    def element(self, number: int) -> str:
        """Takes the JSON value that begins here, as text."""
        wanted = 0  # characters to have before trying again: twice as many each time
        while True:
            try:
                _, end = self._scan(self._text, self._place)
                # A value at the very end of the window could go on (12|34).
                if end < len(self._text) or self._ended:
                    element = self._text[self._place : end]
                    self._place = end
                    return element
            except RecursionError as error:
                raise _broken(number, "it is nested too deeply") from error
            except ValueError as error:
                if self._ended:
                    raise _broken(number, str(error).split(":")[0]) from error
            held = len(self._text) - self._place
            if held > MAX_RECORD_BYTES:
                raise _too_long(f"element {number}")
            wanted = max(2 * held, 1)
            while len(self._text) - self._place < wanted and not self._ended:
                self._more()

    def _more(self) -> None:
        chunk = self._stream.read(_CHUNK_BYTES)
        self._ended = not chunk
        self._text = self._text[self._place :] + self._decode(chunk, final=self._ended)
        self._place = 0


def _broken(number: int, found: str) -> DataError:
    return DataError(
        explain(
            f"element {number} (counted from 0) of a JSON array",
            found=found,
            rule="the file is one whole JSON array, or one object a line",
            remedy="write the file again, or as JSONL: there a broken line costs one row, not all",
        )
    )


def _too_long(place: str) -> DataError:
    return DataError(
        explain(
            place,
            found=f"is longer than {MAX_RECORD_BYTES >> 20} MiB",
            rule="a row of demonstrations is a few kilobytes",
            remedy="check that the file has one object a line, or one array of objects",
        )
    )
