"""What a row of a data set says: a text, or a chat that the checkpoint's own template turns into one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CHATS = ("messages", "conversations", "conversation")
"""Keys whose value is a list of turns."""
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("input", "output"),
)
"""Keys of what a user says and what is answered. What is in :data:`MORE`, if there, goes with an ``instruction``."""
MORE = ("input", "context")
KEYS = frozenset({"text", *CHATS, *MORE, "content", *(key for pair in PAIRS for key in pair)})
"""All keys that are looked at."""
ACCEPTED = (
    '"text", "messages" or "conversations", "prompt" with "completion" or "response", '
    '"instruction" or "input" with "output", "question" with "answer" or "response", or "content"'
)
"""The same for people."""

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "model": "assistant"}
_TEXTS = ("text", "input_text", "output_text")
_SHOWN = 40  # characters of a name from a file that a message shows


@dataclass(frozen=True)
class Chat:
    """Turns of a conversation.

    Attributes:
        turns: (role, content) of each.
    """

    turns: tuple[tuple[str, str], ...]

    def plain(self) -> str:
        """What was said, without who said it, a line or more a turn."""
        return "\n".join(content for _, content in self.turns)

    def messages(self) -> list[dict[str, str]]:
        """As chat templates take them."""
        return [{"role": role, "content": content} for role, content in self.turns]


@dataclass(frozen=True)
class Unusable:
    """A row that is skipped, and why."""

    reason: str


def document(row: Any) -> str | Chat | Unusable:
    """The text or chat in a row: a string, a list of turns, or an object with some of :data:`KEYS`.

    What it holds beside is ignored.

    Args:
        row: any JSON value.
    """
    if isinstance(row, str):
        row = {"text": row}
    if isinstance(row, list) and (chat := _chat(row)):
        return chat
    if not isinstance(row, Mapping):
        return Unusable(f"{_kind(row)}, not an object")
    text = row.get("text")
    if isinstance(text, str) and text.strip():
        return text
    chat = next(filter(None, (_chat(row.get(key)) for key in CHATS)), None) or _pair(row)
    if chat is not None:
        return chat
    content = row.get("content")
    if isinstance(content, str) and content.strip():
        return content
    return Unusable(_reason(row))


def _chat(turns: Any) -> Chat | None:
    """The chat in a list of ``{role, content}`` or ``{from, value}``; ``None`` if it is none, or says nothing.

    Keys that are null count as absent: tables have every key in every row. The ``datasets`` library also makes one
    object of lists of a list of objects.
    """
    if isinstance(turns, Mapping) and all(isinstance(values, list) for values in turns.values()):
        turns = [dict(zip(turns, values, strict=False)) for values in zip(*turns.values(), strict=False)]
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        return None
    found = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            return None
        role, content = _first(turn, "role", "from"), _content(_first(turn, "content", "value"))
        if not isinstance(role, str) or content is None:
            return None
        found.append((_ROLES.get(role, role), content))
    return Chat(tuple(found)) if any(content.strip() for _, content in found) else None


def _first(turn: Mapping, *keys: str) -> Any:
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _content(content: Any) -> str | None:
    """The text of a turn: a string, or parts of which those of a type of text count. Calls of tools may say nothing."""
    if content is None:
        return ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") in _TEXTS else part for part in content
        ]
        return "\n".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else None


def _pair(row: Mapping) -> Chat | None:
    for asked, answered in PAIRS:
        question, answer = row.get(asked), row.get(answered)
        if isinstance(question, str) and isinstance(answer, str) and (question + answer).strip():
            for more in (row.get(key) for key in MORE if asked == "instruction"):
                question = f"{question}\n\n{more}" if isinstance(more, str) and more.strip() else question
            return Chat((("user", question), ("assistant", answer)))
        if isinstance(question, list) and isinstance(answer, list) and (chat := _chat([*question, *answer])):
            return chat
    return None


def _reason(row: Mapping) -> str:
    """Why nothing was found in an object."""
    known = [key for key in row if key in KEYS]
    if "text" in known or len(known) == 1:
        key = "text" if "text" in known else known[0]
        value = row[key]
        if isinstance(value, str) and key not in CHATS:
            return f'"{key}" is empty' if not value.strip() else f'"{key}" lacks the key that goes with it'
        return f'"{key}" is {_kind(value)}' + (" without turns that have a role and text" if key in CHATS else "")
    if known:
        return f"nothing usable in {', '.join(known)}"
    return f"none of the keys that are looked for, but {', '.join(_short(key) for key in list(row)[:4]) or 'none'}"


def _short(key: Any) -> str:
    text = repr(key)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
