"""The rows of a JSON file, one at a time: of a list, of an object that holds a list, or one behind the other."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from vllm_w8a8_bismooth.measure.documents import CHATS, KEYS, Unusable, document

LONGEST = 2**23
"""Characters of a row; longer ones are skipped, so that a row fits into memory whatever it holds."""
_PIECE = 2**16
_ITEM = 32  # characters' worth of memory that every item of a list takes


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
    """What the lists of an object hold, or the object itself where it is a row: tags may come before its text.

    Which it is may show only at its end. Until then what the lists hold is kept, if it is no longer than a row may be.
    """
    fields: dict[str, Any] = {}
    kept = _Kept()
    try:
        yield from _into(cursor, fields, kept)
    except _Broken:
        yield from kept.items
        raise
    if kept.names >= {"columns", "data"}:
        yield Unusable("a table by columns, as pandas splits it; write it with orient='records'")
        return
    row = _usable(fields)
    if not row or any(isinstance(item, Mapping) and _usable(item) for item in kept.items):
        yield from kept.items
    if row or not kept.names:
        yield fields


@dataclass
class _Kept:
    """What the lists of an object hold, until it is clear what they are.

    Attributes:
        names: of the lists.
        rows: whether they are taken for rows, because they are too long to be kept.
        items: what is kept.
        size: of the items, in characters.
    """

    names: set[str] = field(default_factory=set)
    rows: bool = False
    items: list[Any] = field(default_factory=list)
    size: int = 0

    def add(self, item: Any) -> Iterator[Any]:
        """Keep an item, or say that it is a row, with those before it."""
        self.items.append(item)
        self.size += len(str(item)) + _ITEM
        self.rows |= self.size > LONGEST
        if self.rows:
            yield from self.items
            self.items = []


def _usable(row: Any) -> bool:
    return not isinstance(document(row), Unusable)


def _into(cursor: "_Cursor", fields: dict[str, Any], kept: _Kept) -> Iterator[Any]:
    """Read an object to its end: its fields, and what its lists hold."""
    cursor.skip()
    while cursor.peek() == '"':
        key = cursor.value()
        if cursor.peek() != ":":
            raise _Broken("no valid JSON")
        cursor.skip()
        if cursor.peek() == "[" and key not in CHATS and not fields.keys() & KEYS:
            kept.names.add(key)
            for item in _items(cursor):
                yield from kept.add(item)
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
