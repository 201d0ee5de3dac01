"""Open a Hugging Face checkpoint on disk: headers, lazy tensors, side files. Nothing in it is trusted or executed."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_w8a8_bismooth.errors import BismoothError

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
FLOAT_DTYPES = ("BF16", "F16", "F32")
_JSON_LIMIT = 100 * 2**20  # the same bound that safetensors puts on a header
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".pkl", ".pickle", ".npz",
}  # fmt: skip
_PIECE = 2**20


@dataclass(frozen=True)
class Header:
    """Where a tensor lies, its shape, and its dtype as safetensors spells it (``BF16``)."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> dict:
    """A JSON object from disk.

    Raises:
        BismoothError: missing, larger than 100 MiB, not UTF-8, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise BismoothError(f"{path}: larger than {_JSON_LIMIT >> 20} MiB; this is not a checkpoint's {path.name}")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BismoothError(f"{path}: not found; is this the folder of a Hugging Face checkpoint?") from None
    except OSError as error:
        raise BismoothError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except (ValueError, RecursionError) as error:
        raise BismoothError(f"{path}: not valid JSON ({error}); download the file again") from None
    if not isinstance(value, dict):
        raise BismoothError(f"{path}: holds a JSON {type(value).__name__}, not an object; download the file again")
    return value


class Checkpoint:
    """A checkpoint folder, opened by its headers alone.

    Attributes:
        folder: where it lies.
        config: the parsed ``config.json``.
        headers: tensor name -> :class:`Header`, in the order of the files.

    Raises:
        BismoothError: on construction, if config, index or a shard is missing, unreadable, inconsistent or truncated.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise BismoothError(f"{self.folder}: no such folder; give the path of a local Hugging Face checkpoint")
        self.config = read_json(self.folder / CONFIG)
        self.headers: dict[str, Header] = {}
        weight_map = self._read_index()
        for file in sorted(set(weight_map.values())) or [SINGLE]:
            self._read_header(file, weight_map)

    def _read_index(self) -> Mapping[str, str]:
        """Tensor -> the shard that the index names; empty for a checkpoint of one file."""
        if not (self.folder / INDEX).exists():
            if not (self.folder / SINGLE).exists():
                raise BismoothError(
                    f"{self.folder}: neither {SINGLE} nor {INDEX}; only safetensors checkpoints can be converted "
                    "(pickled .bin files are refused: save the model again with save_pretrained)"
                )
            return {}
        path = self.folder / INDEX
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BismoothError(f"{path}: no weight_map; download the file again")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise BismoothError(f"{path}: {name} is said to be in {file!r}, which is not a shard of this folder")
        return weight_map

    def _read_header(self, file: str, weight_map: Mapping[str, str]) -> None:
        from safetensors import SafetensorError, safe_open

        path = self.folder / file
        try:
            if not path.is_file():
                raise BismoothError(f"{path}: named by {INDEX} but absent; download the shard again")
            with safe_open(path, framework="pt") as shard:
                found = {}
                for name in shard.keys():  # noqa: SIM118 (safe_open is not iterable)
                    view = shard.get_slice(name)
                    found[name] = Header(file, tuple(view.get_shape()), view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise BismoothError(f"{path}: truncated or corrupt ({error}); download the shard again") from None
        missing = sorted(name for name, place in weight_map.items() if place == file and name not in found)
        if missing:
            raise BismoothError(
                f"{path}: tensor {missing[0]} is missing, {INDEX} says that it is here; download both again"
            )
        for name, header in found.items():
            place = weight_map.get(name) if weight_map else file
            if place != file:
                raise BismoothError(
                    f"{path}: holds tensor {name}, which {INDEX} places in {place}; one of them is a duplicate "
                    "or stale, download both again"
                )
            if header.dtype not in FLOAT_DTYPES:
                raise BismoothError(
                    f"tensor {name} in {file} has dtype {header.dtype}: already quantized or not a weight; "
                    f"only {', '.join(FLOAT_DTYPES)} checkpoints can be converted"
                )
            self.headers[name] = header

    def read(self, name: str):
        """One tensor, in its stored dtype.

        Raises:
            BismoothError: it holds a NaN or an infinity, or its shard can no longer be read.
        """
        from safetensors import SafetensorError, safe_open

        file = self.headers[name].file
        try:
            with safe_open(self.folder / file, framework="pt") as shard:
                tensor = shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BismoothError(
                f"{self.folder / file}: tensor {name} can no longer be read ({error}); did the source change meanwhile?"
            ) from None
        finite = tensor.isfinite()
        if not finite.all():
            bad = (~finite).nonzero()[0].tolist()
            raise BismoothError(
                f"tensor {name} in {file} holds {tensor[tuple(bad)].item()} at {bad} "
                f"({int((~finite).sum())} such values); download the shard again or repair the model"
            )
        return tensor

    def side_files(self) -> Iterator[Path]:
        """Relative paths of everything to be copied byte for byte: not weights, config, index or hidden files."""
        for path in sorted(self.folder.rglob("*")):
            relative = path.relative_to(self.folder)
            if any(part.startswith(".") for part in relative.parts) or not path.is_file():
                continue
            if path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json") or relative == Path(CONFIG):
                continue
            yield relative

    def fingerprint(self) -> str:
        """SHA-256 over everything that the conversion reads: config, every byte of every shard and side file."""
        digest = hashlib.sha256()
        files = {Path(CONFIG), *(Path(header.file) for header in self.headers.values()), *self.side_files()}
        for relative in sorted(files):
            with open(self.folder / relative, "rb") as file:
                digest.update(f"{relative.as_posix()} {file.seek(0, 2)} ".encode(errors="surrogateescape"))
                file.seek(0)
                while piece := file.read(_PIECE):
                    digest.update(piece)
        return digest.hexdigest()
