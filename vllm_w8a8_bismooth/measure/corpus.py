"""Files of calibration text as people have them: what kind each is of, and its rows, of which one is in memory."""

import gzip
import hashlib
import io
import json
import os
import re
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO

from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure import json_rows, remedies
from vllm_w8a8_bismooth.measure.documents import ACCEPTED, KEYS, Chat, Unusable, document

STDIN = "-"
"""The path of what is piped into the command."""
PLAIN, LINES, JSON, PARQUET = "plain text", "JSON lines", "JSON", "Parquet"

_SUFFIXES = {".txt": PLAIN, ".jsonl": LINES, ".ndjson": LINES, ".json": JSON, ".parquet": PARQUET}
_PIPE = "a pipe"
_DESCRIPTORS = {Path("/dev/fd"), Path("/proc/self/fd")}  # whose names are numbers, as of <(...) in a shell
_GZIP = b"\x1f\x8b"
_HEAD = 2**16  # bytes by which a kind is told
_SAMPLE = 2**24  # bytes by which an encoding is guessed
_PART = 2**20  # characters of a document in memory that become a row
_BATCH = 64  # rows of a Parquet file at a time
_NONE = "or use --calibration none"


class Corpus:
    """One file of calibration text, kept open, so that what is read later is what was looked at first.

    Attributes:
        path: as given.
        name: of the file, without its folders, for the report.
        kind: :data:`PLAIN`, :data:`LINES`, :data:`JSON` or :data:`PARQUET`, by suffix and content.
        sha256: of the bytes as they are in the file.

    Args:
        path: of a file, or :data:`STDIN`. What is piped is copied to a temporary file.
        documents: instead of what the file holds: texts in memory.
        name: instead of the file's own.

    Raises:
        BismoothError: absent, a folder, no text, in an encoding or a format that is not read.
    """

    def __init__(self, path: Path, documents: Iterable[str] | None = None, name: str | None = None):
        self.path = path
        if documents is not None:
            self.name, self._file = "text in memory", _spooled(_lines_of(documents), path)
        elif str(path) == STDIN:
            # Python has none where the shell closed it.
            piped = _pieces(sys.stdin.buffer) if sys.stdin is not None else iter(())
            self.name, self._file = "standard input", _spooled(piped, path)
        else:
            self.name, self._file = _PIPE if path.parent in _DESCRIPTORS else path.name, _opened(path)
        self.name = name or self.name
        self._stat = os.fstat(self._file.fileno())
        self._gzip = self._start(2) == _GZIP
        self.kind = LINES if documents is not None else self._kind()
        self.sha256 = self._digest()

    def rows(self) -> Iterator[tuple[str, Any]]:
        """Where a row is (``line 3``) and its value: any JSON value, or :class:`documents.Unusable`.

        Raises:
            BismoothError: the file is damaged, not UTF-8, or has changed since it was opened; pyarrow is missing.
        """
        if self.kind == PARQUET:
            yield from ((f"row {n}", row) for n, row in enumerate(self._parquet(), 1))
            return
        with self._reading() as text:
            if self.kind == LINES:
                yield from _json_lines(text)
            else:
                yield from ((f"row {n}", row) for n, row in enumerate(json_rows.rows(text), 1))

    def text(self, size: int) -> Iterator[str]:
        """Plain text in pieces of ``size`` characters, the last of which may be shorter; raises as :meth:`rows`."""
        with self._reading() as text:
            while piece := text.read(size):
                yield piece

    def _raw(self) -> BinaryIO:
        """The file's bytes from the beginning. One reader at a time: all share one place in the file."""
        self._file.seek(0)
        now = os.fstat(self._file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            remedy = "run the same command again, with it at rest"
            raise BismoothError.of(self.path, "the calibration file changed meanwhile", remedy)
        return os.fdopen(os.dup(self._file.fileno()), "rb")

    def _digest(self) -> str:
        digest = hashlib.sha256()
        with self._raw() as file, self._damage():
            for piece in _pieces(file):
                digest.update(piece)
        return digest.hexdigest()

    def _start(self, size: int, unpacked: bool = False) -> bytes:
        with self._raw() as file, self._damage():
            if not unpacked:
                return file.read(size)
            return self._unpacked(file).read(size)

    def _unpacked(self, raw: BinaryIO) -> Any:
        return gzip.GzipFile(fileobj=raw) if self._gzip else raw

    @contextmanager
    def _reading(self) -> Iterator[TextIO]:
        """The characters of the file, unpacked, without a byte order mark; line ends are as they are."""
        with self._raw() as raw, self._damage():
            yield io.TextIOWrapper(self._unpacked(raw), encoding="utf-8-sig", newline="\n")

    @contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError:
            place, wide = self._bad_byte()
            sample = self._start(_SAMPLE, unpacked=True)
            coding = remedies.narrow_encoding(self._bytes(), sample)
            remedy = remedies.to_utf8(self.path, self._gzip, coding, wide and remedies.mostly_utf8(sample))
            raise BismoothError.of(self.path, f"not UTF-8 (byte {place})", remedy) from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            what = f"a damaged gzip file ({error})"
            raise BismoothError.of(self.path, what, "copy or download it again") from None
        except OSError as error:
            what = f"calibration file cannot be read ({error.strerror or error})"
            raise BismoothError.of(self.path, what, f"check the path, {_NONE}") from None

    def _bad_byte(self) -> tuple[int, bool]:
        """Where the first byte is that is no UTF-8, in the unpacked file, and if longer characters came before it."""
        done, left, wide = 0, b"", False
        with self._raw() as raw:
            for piece in _pieces(self._unpacked(raw)):
                whole = left + piece
                try:
                    whole.decode()
                    good = len(whole)
                except UnicodeDecodeError as error:
                    good = error.start
                    if error.reason != "unexpected end of data":
                        return done + good, wide or not whole[:good].isascii()
                # What is left is a character that the next piece completes.
                done, left, wide = done + good, whole[good:], wide or not whole[:good].isascii()
        return done, wide

    def _bytes(self) -> set[int]:
        """All bytes beyond ASCII that occur in the unpacked file."""
        found: set[int] = set()
        with self._raw() as raw:
            for piece in _pieces(self._unpacked(raw)):
                found.update(piece.translate(None, bytes(range(128))))
        return found

    def _kind(self) -> str:
        head = self._start(_HEAD, self._gzip)
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        suffix = next((s for s in reversed(suffixes) if not (self._gzip and s == ".gz")), "")
        if suffix in remedies.FORMATTED or head.startswith(b"%PDF-"):
            raise BismoothError.of(self.path, "a formatted document, no plain text", f"save it as .txt, {_NONE}")
        for magic, program in (remedies.PACKED | ({_GZIP: "gzip -dc"} if self._gzip else {})).items():
            if head.startswith(magic):
                what = "compressed in a way that is not read, only gzip is"
                raise BismoothError.of(self.path, what, remedies.to_unpacked(self.path, self._gzip, program))
        if head.startswith(b"PAR1") or suffix == ".parquet":
            if self._gzip or not head.startswith(b"PAR1"):
                if self._gzip:
                    remedy = remedies.to_unpacked(self.path, False, "gzip -dc")
                    raise BismoothError.of(self.path, "a Parquet file that is gzipped as a whole", remedy)
                raise BismoothError.of(self.path, "no Parquet file, by its first bytes", "download it again")
            return PARQUET
        if suffix in remedies.TABLES:
            remedy = remedies.to_rows(self.path, self._gzip, remedies.separator(suffix, head))
            raise BismoothError.of(self.path, "a table, which is not read", remedy)
        kind = _SUFFIXES.get(suffix)
        if (coding := remedies.wide_encoding(head)) is not None:
            remedy = remedies.to_utf8(self.path, self._gzip, coding, False)
            raise BismoothError.of(self.path, f"not UTF-8, but {coding}", remedy)
        if kind is None and b"\0" in head:
            raise BismoothError.of(self.path, "no text (it holds zero bytes)", f"give it text, {_NONE}")
        return PLAIN if kind == PLAIN else _kind_by_content(head.decode("utf-8-sig", "ignore"), kind)

    def _parquet(self) -> Iterator[Any]:
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError:
            remedy = "pip install pyarrow, or give the text as .jsonl"
            raise BismoothError.of(self.path, "pyarrow is not installed, which reads Parquet", remedy) from None
        with self._raw() as raw:
            try:
                # Not a whole column of a group of rows at once, which may be the whole file.
                table = parquet.ParquetFile(raw, pre_buffer=False, buffer_size=2**20)
                names = table.schema_arrow.names
                if not (columns := [name for name in names if name in KEYS]):
                    what = f"has only the columns {', '.join(names[:8])}"
                    raise BismoothError.of(self.path, what, f"rename what holds the text to one of {ACCEPTED}")
                if len(set(columns)) < len(columns):
                    raise BismoothError.of(self.path, "has several columns of one name", "rename all but one")
                groups = (table.metadata.row_group(i) for i in range(table.num_row_groups))
                mean = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
                batch_size = max(1, min(_BATCH, json_rows.LONGEST // max(1, mean)))
                for batch in table.iter_batches(batch_size=batch_size, columns=columns):
                    yield from _rows_of(batch)
            except (pyarrow.ArrowException, OSError, MemoryError) as error:
                what = f"a damaged Parquet file ({error})"
                raise BismoothError.of(self.path, what, "copy or download it again") from None


def _json_lines(text: TextIO) -> Iterator[tuple[str, Any]]:
    number = 0
    while line := text.readline(json_rows.LONGEST):
        number += 1
        if len(line) == json_rows.LONGEST and not line.endswith("\n"):
            while (rest := text.readline(json_rows.LONGEST)) and not rest.endswith("\n"):
                pass
            yield f"line {number}", Unusable(f"longer than {json_rows.LONGEST} characters")
            continue
        if line.strip():
            yield f"line {number}", _parsed(line)


def _rows_of(batch: Any) -> list[Any]:
    """The rows of a pyarrow batch; one that Python cannot hold (bytes that are no UTF-8) costs no more than itself."""
    try:
        return batch.to_pylist()
    except ValueError as error:
        if len(batch) == 1:
            return [Unusable(f"cannot be read ({error})")]
        return [row for i in range(len(batch)) for row in _rows_of(batch.slice(i, 1))]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return Unusable("no valid JSON")


def _kind_by_content(head: str, kind: str | None) -> str:
    """JSON lines, other JSON or, where the suffix does not say that it is JSON, perhaps plain text."""
    first, *others = [line for line in head.split("\n") if line.strip()] or [""]
    row = _parsed(first)
    if isinstance(row, dict) and (kind == LINES or row.keys() & KEYS):
        return LINES
    if isinstance(row, list) and isinstance(document(row), Chat):
        return LINES
    if kind == LINES and isinstance(row, Unusable) and first.lstrip().startswith("{"):
        return JSON if others and _begins_inside(others[0]) else LINES
    if kind is None:
        return JSON if re.match(r"\s*\[?\s*\{\s*\"", head) and _may_be_json(head) else PLAIN
    return JSON if kind == JSON or head.lstrip().startswith("[") else LINES


def _may_be_json(head: str) -> bool:
    """Whether what begins like JSON goes on so, and is no program text; where the head ends before it does, it may."""
    try:
        json.JSONDecoder().raw_decode(head.lstrip())
    except (ValueError, RecursionError):
        return len(head) >= _HEAD // 4  # characters may take four bytes
    return True


def _begins_inside(line: str) -> bool:
    """Whether a line goes on with an object that began in the line before, as programs that indent write them."""
    return re.match(r"\s*(\"(?:[^\"\\]|\\.)*\"\s*:|\}\s*,?\s*$)", line) is not None


def _opened(path: Path) -> IO[bytes]:
    """A file that can be read more than once."""
    try:
        if path.is_dir():
            raise _folder(path)
        file = open(path, "rb")  # noqa: SIM115 (kept open as long as the corpus is)
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        with file:
            return _spooled(_pieces(file), path)
    except (OSError, ValueError) as error:
        what = f"calibration file cannot be read ({getattr(error, 'strerror', None) or error})"
        remedy = f"check the path, {_NONE}"
        if isinstance(error, FileNotFoundError) and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            remedy = remedies.from_hub(str(path))
        raise BismoothError.of(path, what, remedy) from None


def _folder(path: Path) -> BismoothError:
    files = sorted(p for p in path.iterdir() if p.is_file() and {s.lower() for s in p.suffixes[-2:]} & _SUFFIXES.keys())
    what = "a folder" if files else "a folder, and none of its files is known to be text"
    return BismoothError.of(path, what, remedies.to_files(files))


def _spooled(pieces: Iterable[bytes], path: Path) -> IO[bytes]:
    """A temporary file without a name, for what can be read only once; the disk holds it, not memory."""
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115 (kept open as long as the corpus is)
        for piece in pieces:
            file.write(piece)
        file.flush()
    except OSError as error:
        what = f"cannot be kept in {tempfile.gettempdir()} ({error.strerror})"
        raise BismoothError.of(path, what, "set TMPDIR to a folder on a disk with more room") from None
    return file


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(2**20), b"")


def _lines_of(documents: Iterable[str]) -> Iterator[bytes]:
    """JSON lines. Long documents take several, so that none is too long for a row."""
    for whole in documents:
        parts = range(0, len(whole), _PART) if isinstance(whole, str) else ()
        for text in [whole[i : i + _PART] for i in parts] or [whole]:
            yield json.dumps({"text": text}).encode() + b"\n"
