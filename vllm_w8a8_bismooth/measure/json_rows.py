"""The rows of a JSON file, one at a time: of a list, of an object that holds a list, or one behind the other."""

import json
from collections.abc import Iterator
from typing import Any, TextIO

from vllm_w8a8_bismooth.measure.documents import CHATS, KEYS, Unusable

LONGEST = 2**23
"""Characters of a row; longer ones are skipped, so that a row fits into memory whatever it holds."""
_PIECE = 2**16


class _Broken(Exception):
    """What comes next is no JSON, or too long."""


def rows(file: TextIO) -> Iterator[Any]:
    """JSON values and, for what cannot be read, :class:`documents.Unusable`; behind that it goes on in a later line.

    Args:
        file: at its beginning. Only a row of it is held in memory.
    """
    cursor = _Cursor(file)
    while head := cursor.peek():
        try:
            if head == "[":
                yield from _items(cursor)
            elif head == "{":
                yield from _members(cursor)
            elif head in ",]}":  # left over from a list of which a row was broken
                cursor.skip()
            else:
                raise _Broken("no list and no object")
        except _Broken as error:
            yield Unusable(str(error))
            cursor.resume()


def _items(cursor: "_Cursor") -> Iterator[Any]:
    """The values of a list. Commas may be missing, as between rows that were written one by one."""
    cursor.skip()
    while cursor.peek() != "]":
        yield cursor.value()
        if cursor.peek() == ",":
            cursor.skip()
    cursor.skip()


def _members(cursor: "_Cursor") -> Iterator[Any]:
    """What the lists of an object hold, or the object itself where it is a row."""
    cursor.skip()
    fields: dict[str, Any] = {}
    held = False
    while cursor.peek() == '"':
        key = cursor.value()
        if cursor.peek() != ":":
            raise _Broken("no valid JSON")
        cursor.skip()
        if cursor.peek() == "[" and key not in CHATS and not fields.keys() & KEYS:
            held = True
            yield from _items(cursor)
        else:
            value = cursor.value()
            if key in KEYS or len(fields) < 8:  # some others, for the message
                fields[key] = value
        if cursor.peek() != ",":
            break
        cursor.skip()
    if cursor.peek() != "}":
        raise _Broken("no valid JSON")
    cursor.skip()
    if not held:
        yield fields


class _Cursor:
    """A place in a JSON file, and a piece of text from there on."""

    def __init__(self, file: TextIO):
        self._file, self._text, self._at, self._ended = file, "", 0, False
        self._decoder = json.JSONDecoder()

    def _more(self) -> bool:
        """Read on, each time as much again, so that a long value is not looked through too often."""
        left = self._text[self._at :]
        piece = self._file.read(max(_PIECE, len(left)))
        self._text, self._at, self._ended = left + piece, 0, not piece
        return bool(piece)

    def peek(self) -> str:
        """The next character that is no white space; none at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self) -> None:
        self._at += 1

    def value(self) -> Any:
        """The next value, of :data:`LONGEST` characters at most."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:  # else a number may go on
                    self._at = end
                    return value
                whole = True
            except RecursionError:
                raise _Broken("no valid JSON") from None
            except ValueError:
                whole = False
            if len(self._text) - self._at > LONGEST:
                raise _Broken(f"no valid JSON, or longer than {LONGEST} characters")
            if not self._more() and not whole:
                raise _Broken("no valid JSON")

    def resume(self) -> None:
        """To the next line that begins a list or an object."""
        while True:
            end = self._text.find("\n", self._at)
            if end >= 0:
                self._at = end + 1
                if self.peek() in ("[", "{", ""):
                    return
            else:
                self._at = len(self._text)
                if not self._more():
                    return
