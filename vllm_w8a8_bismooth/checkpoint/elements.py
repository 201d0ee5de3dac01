"""Elements of a tensor: read from a file, and looked at."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_w8a8_bismooth.errors import BismoothError, Interrupted

if TYPE_CHECKING:
    import torch

# safetensors' name -> torch's; I8 is what we write.
_DTYPES = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "I8": "int8", "F8_E4M3": "float8_e4m3fn",
    "F64": "float64", "I64": "int64", "I32": "int32", "I16": "int16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def torch_dtype(name: str):
    """torch's dtype for safetensors' name of it."""
    import torch

    return getattr(torch, _DTYPES[name])


def read_into(tensor: "torch.Tensor", path: Path, offset: int, name: str, stride: int | None = None) -> None:
    """Fill a tensor with what a file holds.

    Not by mapping: a file that shrinks would kill the process, and mapped pages count as its memory.

    Args:
        tensor: contiguous.
        path: of the file.
        offset: of its first byte there.
        name: what errors call it.
        stride: bytes from the beginning of one of its rows to that of the next; ``None`` where they lie one behind the
            other.

    Raises:
        Interrupted: the file can no longer be read.
    """
    rows = [tensor] if stride is None or stride == tensor[0].nbytes else list(tensor)
    try:
        with open(path, "rb", buffering=0) as file:
            for number, row in enumerate(rows):
                _fill(bytes_of(row), file.fileno(), offset + number * (stride or 0))
    except OSError as error:
        what = f"tensor {name} can no longer be read ({error})"
        raise Interrupted.of(path, what, "leave the files at rest and run the same command again") from None


def _fill(view: memoryview, descriptor: int, offset: int) -> None:
    done = 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done:]], offset + done)
        if not got:
            raise OSError("the file has become shorter")
        done += got


def bytes_of(tensor: "torch.Tensor") -> memoryview:
    """The memory of a contiguous tensor."""
    import torch

    return tensor.view(-1).view(torch.uint8).numpy().data


def refuse_infinite(tensor: "torch.Tensor", name: str, file: str, shape: tuple[int, ...], first: int) -> None:
    """Raises :class:`BismoothError` if elements of a tensor of some shape, from number ``first`` on, are not all
    finite."""
    import torch

    if not tensor.numel() or all(bound.isfinite() for bound in tensor.aminmax()):
        return
    bad = (~tensor.view(-1).isfinite()).nonzero().view(-1)
    place = [int(i) for i in torch.unravel_index(first + bad[0], shape)]
    found = f"{tensor.view(-1)[bad[0]].item()} at {place} ({len(bad)} such values)"
    raise BismoothError.of(name, f"holds {found} in {file}", "download the shard again or repair the model")
