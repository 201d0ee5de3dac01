"""Commands that make readable calibration text of files that are not; they work as they stand in a shell."""

import json
import re
import shlex
from pathlib import Path

from vllm_w8a8_bismooth.measure.documents import ACCEPTED

TABLES = {".csv": ",", ".tsv": "\t"}
"""Suffixes of tables, and what stands between their columns if the header does not say."""
_SEPARATORS = ",;\t|"
PACKED = {b"(\xb5/\xfd": "zstd -dc", b"BZh": "bzip2 -dc", b"\xfd7zXZ": "xz -dc", b"PK\x03\x04": "funzip"}
"""How the files of compression programs begin, and what unpacks them."""
FORMATTED = {".pdf", ".docx", ".odt", ".rtf", ".doc", ".xlsx", ".xls", ".ods", ".epub"}
"""Suffixes of documents that no command here makes text of."""

_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_ZEROS = 0.3  # of every second byte, in text of UTF-16
_CONTROL = re.compile(r"[\0-\x08\x0e-\x1a]")  # which numbers have, and text has not
_UNDEFINED = {0x81, 0x8D, 0x8F, 0x90, 0x9D}  # in Windows' 1252
_RARE = _UNDEFINED | {0x83, 0x86, 0x87, 0x88, 0x89, 0x8B, 0x98, 0x9B}  # signs that no prose has
_LETTER = re.compile(rb"[A-Za-z\x80-\xff]")
_RUN = re.compile(rb"[\x80-\xff]+")
_WITHIN = re.compile(rb"[A-Za-z]([\x80-\xbf])[A-Za-z]")
_JOINING = {0x8A, 0x8C, 0x8E, 0x92, 0x96, 0x9A, 0x9C, 0x9E, 0xAD, 0xB4, 0xB7}  # letters, apostrophes, hyphens
_ESCAPED = re.compile("[\udc80-\udcff]")
_MANY = 1 / 3  # of letters; Western text has fewer that are not ASCII
_CANDIDATES = (
    "Cyrillic CP1251 or KOI8-R, Chinese GB18030 or BIG5, Japanese SHIFT_JIS or EUC-JP, Korean CP949, Central European "
    "CP1250, Greek CP1253"
)


def wide_encoding(head: bytes) -> str | None:
    """The encoding of text in two or four bytes a character, told by the file's first bytes; ``None`` if it is none."""
    for mark, coding in _MARKS.items():
        if head.startswith(mark):
            return coding
    high, low = (head[i::2].count(0) for i in (0, 1))
    least = max(1, _ZEROS * (len(head) // 2))
    if (high >= least) == (low >= least):
        return None
    coding = "UTF-16BE" if high >= least else "UTF-16LE"
    return None if _CONTROL.search(head.decode(coding, "ignore")) else coding


def narrow_encoding(found: set[int], text: bytes) -> str | None:
    """The encoding of text in one byte a character, if it is Western: Windows' or Latin-1. ``None`` is not known.

    Every byte is a letter in some encoding, so that a wrong one fails nowhere and spoils the text without a word. In
    Western text those beyond ASCII are few, and stand alone.

    Args:
        found: the bytes beyond ASCII that occur.
        text: some of it.
    """
    runs = _RUN.findall(text)
    high, letters = sum(map(len, runs)), len(_LETTER.findall(text))
    within = {byte[0] for byte in _WITHIN.findall(text)}
    alone = sum(len(run) == 1 for run in runs)
    if not runs or found & _RARE or within - _JOINING or high > _MANY * letters or 2 * alone < len(runs):
        return None
    return "CP1252" if found & set(range(0x80, 0xA0)) else "LATIN1"


def mostly_utf8(text: bytes) -> bool:
    """Whether it looks like UTF-8 that was damaged: two bytes of another encoding are a character here and there."""
    letters = text.decode("utf-8", "surrogateescape")
    wrong = len(_ESCAPED.findall(letters))
    return sum(not letter.isascii() for letter in letters) >= 2 * wrong


def to_utf8(path: Path, gzipped: bool, coding: str | None, wide: bool) -> str:
    """For text in another encoding.

    Args:
        path: of the file.
        gzipped: whether it must be unpacked before.
        coding: its encoding, as iconv calls it; ``None`` is not known.
        wide: whether characters of more than one byte come before the first that is no UTF-8: then it is no other
            encoding, but damaged.
    """
    program = "iconv -c -f UTF-8 -t UTF-8" if wide else f"iconv -f {coding or 'ENCODING'} -t UTF-8"
    what = "leave out what is damaged" if wide else "convert it"
    if coding is None and not wide:
        what = f"its encoding cannot be told by its bytes, so name it ({_CANDIDATES}) and convert it"
    name = _unpacked_name(path, gzipped)
    return f"{what}: {_command(path, gzipped, program, f'{name.stem}-utf8{name.suffix}')}"


def separator(suffix: str, head: bytes) -> str:
    """What stands between the columns of a table: of what its header has most, outside quotes.

    Args:
        suffix: of the file, which decides where the header has none.
        head: the beginning of the file.
    """
    header = re.sub(rb'"[^"]*"', b"", head).lstrip().partition(b"\n")[0].decode("utf-8", "ignore")
    most = max(_SEPARATORS, key=header.count)
    return most if header.count(most) > header.count(TABLES[suffix]) else TABLES[suffix]


def to_rows(path: Path, gzipped: bool, between: str) -> str:
    """For a table, see :func:`separator`."""
    program = (
        "python3 -c 'import csv, json; csv.field_size_limit(2**30); [print(json.dumps(row)) for row in csv.DictReader("
        f'open(0, encoding="utf-8-sig", newline=""), delimiter={json.dumps(between)})]\''
    )
    made = _unpacked_name(path, gzipped).with_suffix(".jsonl").name
    return f"make JSON lines of it: {_command(path, gzipped, program, made)} (columns that are read: {ACCEPTED})"


def to_unpacked(path: Path, gzipped: bool, program: str) -> str:
    """For a compressed file, see :data:`PACKED`, which may be gzipped besides."""
    return f"unpack it: {_command(path, gzipped, program, f'unpacked-{path.stem}')}"


def to_files(files: list[Path]) -> str:
    """For a folder: those of its files that can be read are named one by one."""
    if not files:
        return "give a file of text, JSON lines, JSON or Parquet"
    named = " ".join(f"--calibration {shlex.quote(str(path))}" for path in files[:3])
    return f"name its files: {named}" + (f" (and {len(files) - 3} more)" if len(files) > 3 else "")


def from_hub(name: str) -> str:
    """For the name of a data set on the Hub."""
    return (
        "check the path. If it is a data set on the Hub, write it to a file first (pip install datasets): "
        'python3 -c \'import sys, datasets; datasets.load_dataset(sys.argv[1], split="train").to_json("text.jsonl")\' '
        + shlex.quote(name)
    )


def _unpacked_name(path: Path, gzipped: bool) -> Path:
    return Path(path.stem if gzipped and path.suffix.lower() == ".gz" else path.name)


def _command(path: Path, gzipped: bool, program: str, made: str) -> str:
    """A program that reads and writes standard streams, on a file; what it makes is in the current folder."""
    if str(path) == "-":
        return f"... | {'gzip -dc | ' if gzipped else ''}{program}"
    source, target = shlex.quote(str(path)), shlex.quote(made)
    return f"gzip -dc < {source} | {program} > {target}" if gzipped else f"{program} < {source} > {target}"
