"""Times the schemes that could serve a linear, on the device, as they would serve it."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme

from vllm_w8a8_bismooth.ops import kernels, timing
from vllm_w8a8_bismooth.serving.plan import STOCK, WEIGHTS, Shape

logger = init_logger("vllm.w8a8_bismooth")

Make = Callable[[], CompressedTensorsScheme]

_PER_CALL = 0.03
"""Seconds for each number of tokens, about, all kernels together; each has at least five turns."""
_COPIES = {"cpu": 8, "cuda": 64}
"""At most so many copies of a weight: small ones stay in the caches of a model that is served, too."""
_ROWS, _TOKENS, _ERROR = 64, 16, 0.05
"""Of the check of numbers: rows, tokens, and the relative error, several times that of INT8 activations."""
_STEP = 0.04  # the fixed scale of activations, for standard normal ones


class _Linear(torch.nn.Module):
    """A linear with random weights, as one scheme has it."""

    bias = None
    prefix = "measured"
    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, scheme: CompressedTensorsScheme, shape: Shape, dtype: torch.dtype, generator: torch.Generator):
        super().__init__()
        device = generator.device
        self.scheme = scheme
        self.input_size, self.output_size = shape.columns, shape.rows
        scheme.create_weights(
            layer=self,
            input_size=shape.columns,
            input_size_per_partition=shape.columns,
            output_partition_sizes=[shape.rows],
            output_size=shape.rows,
            params_dtype=dtype,
            weight_loader=lambda *_: None,
        )
        codes = torch.randint(-127, 128, self.weight.shape, dtype=torch.int8, device=device, generator=generator)
        scale = torch.rand(self.weight_scale.shape, device=device, generator=generator) * 1e-3 + 1e-3
        self.weight.data.copy_(codes)
        self.weight_scale.data.copy_(scale)
        if isinstance(fixed := getattr(self, "input_scale", None), torch.Tensor):
            fixed.data.fill_(_STEP)
        spread = scale[:_ROWS].reshape(-1, shape.groups).repeat_interleave(shape.columns // shape.groups, dim=1)
        self.expected = codes[:_ROWS].float() * spread
        """The first rows in float, ``[64, K]``."""
        scheme.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scheme.apply_weights(self, x, None)


@torch.no_grad()
def measure(
    makes: Mapping[str, Make],
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    tokens: Collection[int] = tuple(WEIGHTS),
) -> dict[str, dict[int, float]]:
    """Seconds of a linear by kernel and tokens; empty for a kernel that fails, or whose numbers are not those of the
    product.

    On a GPU graphs are replayed; weights rotate, so that no cache holds them; kernels take turns.

    Args:
        makes: kernel -> makes the scheme that has it serve.
        shape: of the linear.
        dtype: of its input and output.
        device: where it is.
        tokens: numbers of rows of the input.

    Raises:
        torch.OutOfMemoryError: the device has no room for it, which is nobody's fault.
    """
    copies = min(_COPIES[device.type], timing.copies_against_caches(device.type, shape.rows * shape.columns))
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(max(*tokens, _TOKENS), shape.columns, device=device, generator=generator).to(dtype)
    layers: dict[str, list[_Linear]] = {}
    found: dict[str, dict[int, float]] = {}
    with torch.device(device):
        for kernel, make in makes.items():
            found[kernel] = {}
            try:
                serve(kernel, shape, device.type)
                layers[kernel] = [_Linear(make(), shape, dtype, generator) for _ in range(copies)]
                if not _right(layers[kernel][-1], x[:_TOKENS]):
                    raise ArithmeticError("its numbers are wrong")
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a kernel can raise
                _leave_out(layers, kernel, shape, error)
        for count in tokens:
            _time(layers, found, shape, x[:count])
    return {kernel: times if kernel in layers else {} for kernel, times in found.items()}


def serve(kernel: str, shape: Shape, device_type: str) -> None:
    """Have one of our kernels do the products of a shape in this process; vLLM's own needs nothing.

    Raises:
        ValueError: it cannot.
    """
    if kernel != STOCK:
        kernels.choose(device_type, shape.rows, shape.columns, shape.groups, kernel)


def _leave_out(layers: dict[str, list[_Linear]], kernel: str, shape: Shape, error: Exception) -> None:
    layers.pop(kernel, None)
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    logger.warning("w8a8_bismooth: %s fails for linears of %s, so it does not serve them: %s", kernel, shape, reason)


def _right(layer: _Linear, x: torch.Tensor) -> bool:
    want = x.float() @ layer.expected.t()
    return bool((layer(x)[:, : want.shape[1]].float() - want).norm() <= _ERROR * want.norm())  # NaN is not


def _call(layers: Sequence[_Linear], x: torch.Tensor, index: int) -> torch.Tensor:
    return layers[index](x)


def _time(layers: dict[str, list[_Linear]], found: dict[str, dict[int, float]], shape: Shape, x: torch.Tensor) -> None:
    """Add the times of one input; a kernel that fails leaves ``layers``.

    Two of ours are only there on GPUs, where a graph keeps the one that served when it was captured.
    """
    runs = {}
    for kernel, its in list(layers.items()):
        try:
            serve(kernel, shape, x.device.type)
            runs[kernel] = timing.prepare(functools.partial(_call, its, x), len(its), x.device.type)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _leave_out(layers, kernel, shape, error)
    if runs:
        for kernel, times in timing.times(runs, _PER_CALL).items():
            found[kernel][len(x)] = min(times) * 1e-6  # what else the machine does can only add to it
