"""The device on which the self-test launches its cases: a GPU with compiled kernels, or this CPU."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from vllm_w8a8_bismooth.ops import kernels, packing
from vllm_w8a8_bismooth.ops.selftest import cases
from vllm_w8a8_bismooth.ops.selftest.cases import Tile

QUANTIZATIONS = ("quantize_activations", "rms_norm_quantize", "silu_mul_quantize")
SPLITS, OVERLAP = "sums in parts", "overlapping launches"
"""What several launches together are tried for: counters of tiles that are split along K, and kernels that begin before
the one ahead of them has ended."""
TURNS = 200
DEVICE = "cuda"


def compiled(device_type: str, operations: Sequence[str]) -> list[str]:
    """Those of some operations that compiled kernels do."""
    return [each for each in operations if kernels.server(device_type, each) == kernels.COMPILED]


def tiles(number: int) -> list[Tile]:
    """The compiled products that fit a GPU."""
    numbers = torch.ops.w8a8_bismooth.device_tiles(number)
    rows = [numbers[at : at + 6] for at in range(0, len(numbers), 6)]
    return [
        Tile(index, kernels.GRANULARITIES[each], tokens, weights, ring, bool(splits))
        for index, each, tokens, weights, ring, splits in rows
    ]


def restrict(index: int, fitting: Sequence[Tile], faults: Mapping[str, str]) -> None:
    """Have a GPU's compiled kernels do without what had faults, in this process."""
    masks = dict.fromkeys(kernels.GRANULARITIES, 0)
    for tile in fitting:
        masks[tile.granularity] |= (tile.name in faults) << tile.index
    torch.ops.w8a8_bismooth.device_restrict(index, *masks.values(), SPLITS not in faults, OVERLAP not in faults)


class Gpu:
    """See :class:`cases.Machine`."""

    def __init__(self, index: int):
        self.index = index
        self.tiles: Sequence[Tile] = tiles(index)
        self.operations: Sequence[str] = compiled("cuda", QUANTIZATIONS)
        self.processors = torch.cuda.get_device_properties(index).multi_processor_count
        self.faults: Mapping[str, str] = {}
        torch.cuda.set_device(index)
        torch.manual_seed(0)

    def product(self, tile: Tile, split: int, *operands: Any) -> torch.Tensor:
        a, b, a_scale, b_scale, dtype, bias = map(_moved, operands)
        torch.cuda.synchronize()  # so that nothing overlaps
        out = torch.ops.w8a8_bismooth.scaled_mm_tile(a, b, a_scale, b_scale, dtype, bias, tile.index, split)
        return out.cpu()

    def quantize(self, operation: str, *arguments: Any) -> Sequence[torch.Tensor]:
        there = list(map(_moved, arguments))
        torch.cuda.synchronize()
        found = getattr(torch.ops.w8a8_bismooth, operation)(*there)
        return [each.cpu() for each in (*found, *cases.residual(operation, there))]

    def restrict(self, faults: Mapping[str, str]) -> None:
        self.faults = faults
        restrict(self.index, self.tiles, faults)

    def together(self) -> Mapping[str, Callable[[], str]]:
        return {SPLITS: self._splits, OVERLAP: self._overlap}

    def _layers(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int | None]]:
        """Weights, their scales and group sizes, of the granularities that have a tile left."""
        for group_size in (None, 128, 32):
            each = kernels.granularity(group_size)
            if any(tile.granularity == each and tile.name not in self.faults for tile in self.tiles):
                weights = torch.randint(-127, 128, (1040, 4096), dtype=torch.int8, device=DEVICE)
                groups = 4096 // (group_size or 4096)
                yield weights, torch.rand(groups, 1040, device=DEVICE).t(), group_size

    def _splits(self) -> str:
        """A graph with a product in parts, replayed beside eager launches of others on a second stream."""
        multiply = torch.ops.w8a8_bismooth.scaled_mm
        for weights, scale, _ in self._layers():
            a = torch.randint(-127, 128, (2, 3, 4096), dtype=torch.int8, device=DEVICE)
            a_scale = torch.rand(3, 1, device=DEVICE)
            want = [multiply(each, weights, a_scale, scale, torch.float32) for each in a]
            side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                replayed = multiply(a[0], weights, a_scale, scale, torch.float32)
            for _ in range(TURNS):
                graph.replay()
                with torch.cuda.stream(side):
                    beside = multiply(a[1], weights, a_scale, scale, torch.float32)
                if not torch.equal(replayed, want[0]):
                    return "a product in a graph is wrong beside others"
            torch.cuda.synchronize()
            if not torch.equal(beside, want[1]):
                return "a product is wrong beside one in a graph"
        return ""

    def _overlap(self) -> str:
        """Quantization and product, right after each other, with weights that may be loaded ahead of time."""
        if "quantize_activations" in self.faults:
            return "not tried, because quantize_activations is wrong"
        quantize, multiply = torch.ops.w8a8_bismooth.quantize_activations, torch.ops.w8a8_bismooth.scaled_mm
        for weights, scale, group_size in self._layers():
            sources = torch.randn(4, 16, 4096, device=DEVICE).bfloat16()
            want = []
            for source in sources:
                codes, its_scale = quantize(source, group_size)
                torch.cuda.synchronize()
                want.append(multiply(codes, weights, its_scale, scale, torch.bfloat16))
                torch.cuda.synchronize()
            got = []
            for turn in range(TURNS):
                codes, its_scale = quantize(sources[turn % 4], group_size)
                got.append(multiply(codes, weights, its_scale, scale, torch.bfloat16, None, True))
            torch.cuda.synchronize()
            if not all(torch.equal(each, want[turn % 4]) for turn, each in enumerate(got)):
                return "a product is wrong when it begins before the quantization ahead of it has ended"
        return ""


class Cpu:
    """See :class:`cases.Machine`. Its kernels choose their tiles themselves, and run one after another."""

    processors = 1

    def __init__(self) -> None:
        self.tiles: Sequence[Tile] = [Tile(-1, each, 16, 16, 512, False) for each in kernels.GRANULARITIES]
        self.operations: Sequence[str] = compiled("cpu", QUANTIZATIONS)

    def product(self, tile: Tile, split: int, *operands: Any) -> torch.Tensor:
        a, b, a_scale, b_scale, dtype, bias = operands
        groups = b_scale.shape[1]
        packed = packing.pack_weight(b, None if groups == 1 else b.shape[1] // groups)
        return torch.ops.w8a8_bismooth.scaled_mm(a, packed, a_scale, b_scale, dtype, bias)

    def quantize(self, operation: str, *arguments: Any) -> Sequence[torch.Tensor]:
        found = getattr(torch.ops.w8a8_bismooth, operation)(*arguments)
        return [*found, *cases.residual(operation, arguments)]

    def restrict(self, faults: Mapping[str, str]) -> None:
        pass

    def together(self) -> Mapping[str, Callable[[], str]]:
        return {}


def _moved(value: Any) -> Any:
    """To the GPU, laid out as it was."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE).copy_(value)
