"""Commands that make readable calibration text of files that are not; they work as they stand in a shell."""

import re
import shlex
from pathlib import Path

from vllm_w8a8_bismooth.measure.documents import ACCEPTED

TABLES = {".csv": ",", ".tsv": "\\t"}
"""Suffixes of tables, and what stands between their columns."""
PACKED = {b"(\xb5/\xfd": "zstd -dc", b"BZh": "bzip2 -dc", b"\xfd7zXZ": "xz -dc", b"PK\x03\x04": "funzip"}
"""How the files of compression programs begin, and what unpacks them."""
FORMATTED = {".pdf", ".docx", ".odt", ".rtf", ".doc", ".xlsx", ".xls", ".ods", ".epub"}
"""Suffixes of documents that no command here makes text of."""

_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_ZEROS = 0.3  # of every second byte, in text of UTF-16
_CONTROL = re.compile(r"[\0-\x08\x0e-\x1a]")  # which numbers have, and text has not
_UNDEFINED = {0x81, 0x8D, 0x8F, 0x90, 0x9D}  # in Windows' 1252


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


def narrow_encoding(found: set[int]) -> str:
    """The encoding of text in one byte a character, told by the bytes beyond ASCII that occur: Windows' or Latin-1."""
    return "CP1252" if found & set(range(0x80, 0xA0)) and not found & _UNDEFINED else "LATIN1"


def to_utf8(path: Path, gzipped: bool, coding: str, wide: bool) -> str:
    """For text in another encoding.

    Args:
        path: of the file.
        gzipped: whether it must be unpacked before.
        coding: its encoding, as iconv calls it.
        wide: whether characters of more than one byte come before the first that is no UTF-8: then it is no other
            encoding, but damaged.
    """
    program = "iconv -c -f UTF-8 -t UTF-8" if wide else f"iconv -f {coding} -t UTF-8"
    what = "leave out what is damaged" if wide else "convert it"
    name = _unpacked_name(path, gzipped)
    return f"{what}: {_command(path, gzipped, program, f'{name.stem}-utf8{name.suffix}')}"


def to_rows(path: Path, gzipped: bool, separator: str) -> str:
    """For a table, see :data:`TABLES`."""
    program = (
        "python3 -c 'import csv, json; csv.field_size_limit(2**30); [print(json.dumps(row)) for row in csv.DictReader("
        f'open(0, encoding="utf-8-sig", newline=""), delimiter="{separator}")]\''
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
