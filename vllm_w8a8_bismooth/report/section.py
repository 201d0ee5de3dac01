"""A section of a card that is measured later than the card is written, between two marks that readers do not show."""

import os
import re
from pathlib import Path

from vllm_w8a8_bismooth.checkpoint.files import write_atomically
from vllm_w8a8_bismooth.errors import BismoothError, Interrupted

BEGIN, END = "<!-- bismooth score: begin -->", "<!-- bismooth score: end -->"
_SECTION = re.compile(re.escape(BEGIN.encode()) + rb".*?" + re.escape(END.encode()) + rb"\n{0,2}", re.DOTALL)
_BEFORE = re.compile(rb"^## Verify\r?$", re.MULTILINE)


def held(card: bytes) -> bytes:
    """The section with its marks and the lines behind it; empty if there is none."""
    found = _SECTION.search(card)
    return found[0] if found else b""


def without(card: bytes) -> bytes:
    """The card as it is without the section."""
    return _SECTION.sub(b"", card, count=1)


def put(card: bytes, text: str) -> bytes:
    """The card with a section: in the place of the earlier one, else before `Verify` as our cards have it, else last.

    Nothing else of the card changes.

    Args:
        card: in any encoding that ASCII is a part of.
        text: Markdown.
    """
    section = f"{BEGIN}\n{text.strip()}\n{END}\n".encode()
    if earlier := _SECTION.search(card):
        rest = earlier[0][earlier[0].index(END.encode()) + len(END) :]
        return card[: earlier.start()] + section.removesuffix(b"\n") + rest + card[earlier.end() :]
    if heading := _BEFORE.search(card):
        return card[: heading.start()] + section + b"\n" + card[heading.start() :]
    gap = b"" if not card or card.endswith(b"\n\n") else b"\n" if card.endswith(b"\n") else b"\n\n"
    return card + gap + section


def carried_over(card: bytes, drawn: bytes) -> bytes:
    """A card that was drawn up anew, with the section that the earlier one has."""
    section = held(card)
    return put(drawn, section.decode(errors="replace").replace(BEGIN, "").replace(END, "")) if section else drawn


def refuse_broken(path: Path) -> bytes:
    """What a card holds; empty if there is none.

    Raises:
        BismoothError: it cannot be read, or one of the marks stands alone or more than once, so that it is not clear
            what may be replaced.
    """
    try:
        card = path.read_bytes() if os.path.lexists(path) else b""
    except OSError as error:
        remedy = "check the path and its permissions, or leave out --write-card"
        raise BismoothError.of(path, f"cannot be read ({error.strerror})", remedy) from None
    marks = card.count(BEGIN.encode()), card.count(END.encode())
    if marks not in ((0, 0), (1, 1)) or (marks == (1, 1) and not held(card)):
        what = f"has {marks[0]} times the line {BEGIN} and {marks[1]} times {END}, which should enclose one table"
        raise BismoothError.of(path, what, "leave one of each, in this order, or none")
    return card


def write(path: Path, text: str) -> None:
    """Put a section into a card on the disk, in one step; a card that is not there is made.

    Raises:
        BismoothError: as :func:`refuse_broken`.
        Interrupted: it cannot be written.
    """
    content = put(refuse_broken(path), text)
    try:
        write_atomically(path, lambda unnamed: unnamed.write_bytes(content))
    except OSError as error:
        raise Interrupted.of(path, f"cannot be written ({error})", "check space and permissions") from None
