"""Our operations on a CPU, done by Triton's interpreter; for a process that starts with ``TRITON_INTERPRET=1``.

The interpreter runs the kernels' Python with numpy, a program after another. In one respect it differs from every
device, which is mended here: it cuts fp32 off to bf16, and loses bf16's subnormal numbers.
"""

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from vllm_w8a8_bismooth import ops
from vllm_w8a8_bismooth.ops import kernels, schema
from vllm_w8a8_bismooth.ops.triton import OPERATIONS, tiles


class Driver:
    """Of a device that is only known by its target."""

    utils = SimpleNamespace(get_device_properties=lambda index: {"multiprocessor_count": 4})

    def __init__(self, backend: str, architecture: object, lanes: int):
        self.target = GPUTarget(backend, architecture, lanes)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> object:
        return self.target.arch


_cast = InterpreterBuilder.cast_impl


def _exact_cast(self: InterpreterBuilder, source: TensorHandle, to: tl.dtype) -> TensorHandle:
    data = np.ascontiguousarray(source.data)
    match (source.dtype.scalar, to.scalar):
        case (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(data).bfloat16()
            return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        case (tl.bfloat16, tl.float32):
            return TensorHandle((data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    return _cast(self, source, to)


InterpreterBuilder.cast_impl = _exact_cast
for _name, _operation in OPERATIONS.items():
    schema.LIBRARY.impl(_name, _operation, "CPU", allow_override=True)
    kernels._SERVERS.update({("cpu", _name, granularity): kernels.TRITON for granularity in kernels.GRANULARITIES})
driver.set_active(Driver("cuda", 90, 32))


def call(name: str, *arguments: Any) -> tuple[Any, tuple]:
    """What a function of :mod:`ops` returns, and its arguments afterwards, one of which it may have written."""
    return getattr(ops, name)(*arguments), arguments


def call_with_tile(tile: tuple[int, ...], name: str, *arguments: Any) -> Any:
    """What a function of :mod:`ops` returns if all its products take this tile."""
    choose, tiles.choose = tiles.choose, lambda *_: tiles.Tile(*tile)
    try:
        return getattr(ops, name)(*arguments)
    finally:
        tiles.choose = choose


def opcheck(name: str, *arguments: Any) -> dict[str, str]:
    """torch's checks of a registered operation against its schema and its fake."""
    operation = getattr(torch.ops.w8a8_bismooth, name).default
    return torch.library.opcheck(operation, arguments)


def interpreted() -> bool:
    """Whether it is the interpreter that runs the kernels here."""
    from vllm_w8a8_bismooth.ops.triton import product

    return "interpreter" in inspect.getmodule(type(product._product)).__name__
