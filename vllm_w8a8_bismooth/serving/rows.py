"""Linears whose checkpoint has rows of four bits and of eight: loaded by vLLM's loaders; served as they are on CPUs,
with our kernels, and elsewhere as the INT8 that they stand for."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.model_executor.parameter import BasevLLMParameter, ChannelQuantScaleParameter, ModelWeightParameter

from vllm_w8a8_bismooth import fourbits, grouping, ops
from vllm_w8a8_bismooth.serving import fusion, servers
from vllm_w8a8_bismooth.serving.scheme import W8A8Scheme, own_name, stored_rows

logger = init_logger("vllm.w8a8_bismooth")

PACKED, MULTIPLIER, OFFSET, ROWS, LOW = PARTS = tuple(f"weight_{part}" for part in fourbits.DTYPES)
"""Parameters, as the checkpoint calls them too; see :class:`fourbits.Rows`."""
_LAID_OUT = ("weight", "weight_four", "weight_steps", "weight_order")
"""Parameters for the kernel, in the order of :class:`ops.PackedRows`."""
_AGAIN = "the checkpoint is incomplete or corrupt, convert it again"


class RowsScheme(W8A8Scheme):
    """INT8 weights per channel in rows of four and eight bits, INT8 activations per token.

    Which rows have eight bits, and their lower halves, differ in number from part to part of a merged linear, so that
    they are kept as they arrive, in whatever order, until all has.

    Args:
        group_size: columns that share a step in rows of four bits.
        fused: see :class:`W8A8Scheme`.
    """

    def __init__(self, group_size: int, fused: Mapping[str, Sequence[str]]):
        super().__init__(None, None, fused=fused)
        self._group_size = group_size
        self._arrived: dict[str, set[Any]] = {}
        self._numbers: dict[Any, torch.Tensor] = {}
        self._halves: dict[Any, torch.Tensor] = {}
        self._packed = False

    def _create_codes(self, layer: LinearBase, rows: int, columns: int, weight_loader: Callable) -> None:
        """Register uint8 ``weight_packed [N, K / 2]``, uint8 and int8 ``weight_multiplier`` and ``weight_offset``
        ``[N, K / g]``, and int32 ``weight_rows [N, 1]``: which of all lower halves that arrived is a row's, or -1.

        Raises:
            ValueError: this rank's share of K is not a multiple of the group size.
        """
        groups = self._groups(layer, columns, self._group_size)
        for name, width in ((PACKED, columns // 2), (MULTIPLIER, groups), (OFFSET, groups)):
            data = torch.empty(rows, width, dtype=_dtype(name))
            parameter = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=weight_loader)
            layer.register_parameter(name, parameter)
        # Nothing is copied into these while vLLM loads. So when it loads again it waits, before it has them processed,
        # until it has read the whole checkpoint, because it takes the layer for one that lacks something.
        index = torch.empty(rows, 1, dtype=_dtype(ROWS))
        layer.register_parameter(
            ROWS, ChannelQuantScaleParameter(data=index, output_dim=0, weight_loader=weight_loader)
        )
        low = BasevLLMParameter(data=torch.empty(0, dtype=_dtype(LOW)), weight_loader=weight_loader)
        layer.register_parameter(LOW, low)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Lay all parts out for the kernel that multiplies by rows of four bits; without one, make INT8 of them.

        With the kernel, ``weight``, ``weight_four``, ``weight_steps`` and ``weight_order`` are those of
        :class:`ops.PackedRows`, and ``weight_scale`` is in their order. Else all is as :class:`W8A8Scheme` has it.

        Raises:
            ValueError: a part is missing from the checkpoint, or does not fit the others, or stands for no codes; see
                also :meth:`W8A8Scheme.process_weights_after_loading`.
        """
        rows = self._rows(layer)
        for kept in (self._arrived, self._numbers, self._halves):
            kept.clear()
        for name in PARTS:
            delattr(layer, name)
        self._packed = ops.has_kernel(rows.packed.device.type, "linear_rows")
        try:
            weight = ops.pack_rows(rows) if self._packed else rows.codes()
        except ValueError as error:
            raise ValueError(f"{getattr(layer, 'prefix', 'linear')}.{PACKED}: {error}; {_AGAIN}") from None
        if isinstance(weight, torch.Tensor):
            layer.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
            super().process_weights_after_loading(layer)
            return
        servers.announce(logger, "linears with rows of four bits", "cpu", None)
        for name, tensor in zip(_LAID_OUT, (weight.eight, weight.four, weight.steps, weight.order), strict=True):
            layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        scale = layer.weight_scale.data[weight.order.long()]
        replace_parameter(layer, "weight_scale", torch.nn.Parameter(scale, requires_grad=False))
        fusion.accept_quantized(layer, self.activation_group_size)

    def apply_weights(
        self, layer: LinearBase, x: "torch.Tensor | fusion.QuantizedActivation", bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See :meth:`W8A8Scheme.apply_weights`."""
        if not self._packed:
            return super().apply_weights(layer, x, bias)
        weight = ops.PackedRows(*(getattr(layer, name) for name in _LAID_OUT))
        if (given := fusion.as_quantized(layer, x)) is None:
            return ops.linear_rows(x, weight, layer.weight_scale, bias)
        if isinstance(given, fusion.Unactivated):
            return ops.linear_rows(given.data, weight, layer.weight_scale, bias, silu_mul=True)
        codes, scale = given.data.flatten(0, -2), given.scale.flatten(0, -2)
        out = ops.scaled_mm_rows(codes, weight, scale, layer.weight_scale, given.orig_dtype, bias)
        return out.view(*given.orig_shape[:-1], out.shape[1])

    def _rows(self, layer: LinearBase) -> fourbits.Rows:
        """What has arrived of this rank's share; where nothing did (``--load-format dummy``), rows of zeros."""
        packed, multiplier, offset = (getattr(layer, name).data for name in (PACKED, MULTIPLIER, OFFSET))
        if not self._arrived:
            packed.zero_(), multiplier.fill_(1), offset.zero_()
            none = torch.empty(0, dtype=_dtype(ROWS), device=packed.device)
            return fourbits.Rows(packed, multiplier, offset, none, packed[:0])
        self._check_complete(layer)
        self._check_arrived(layer, "weight_scale", layer.weight_scale.data.isfinite(), "not finite")
        self._check_arrived(layer, MULTIPLIER, multiplier > 0, "0")
        return fourbits.Rows(packed, multiplier, offset, *self._wide(layer))

    def _wide(self, layer: LinearBase) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's share of the 8-bit rows: int32 ``[n]``, and uint8 ``[n, K / 2]``.

        vLLM's own loader shares out rows: it is given, for all rows of a part, where among all lower halves theirs are.
        """
        index, packed, first = layer.weight_rows, layer.weight_packed, 0
        index.data.fill_(-1)
        for part, numbers in self._numbers.items():
            places = torch.full((_rows_of(layer, part), 1), -1, dtype=torch.int32, device=numbers.device)
            places[numbers.long(), 0] = torch.arange(
                first, first + len(numbers), dtype=torch.int32, device=numbers.device
            )
            self._loader(index, places, *(() if part is None else (part,)))
            first += len(numbers)
        half = packed.shape[1]
        start = packed.tp_rank * half if half < layer.input_size // 2 else 0  # where columns are shared out
        low = [self._halves[part][:, start : start + half] for part in self._numbers]
        places = index.data.view(-1).cpu()
        mine = (places >= 0).nonzero().view(-1)
        whole = torch.cat([*low, torch.empty(0, half, dtype=torch.uint8, device="cpu")])
        return mine.to(packed.device, torch.int32), whole[places[mine].long()].to(packed.device)

    def _checking(self, weight_loader: Callable, layer: LinearBase) -> Callable:
        """Wraps the loader, too, to note what has arrived, and to keep 8-bit rows."""
        checked, self._loader = super()._checking(weight_loader, layer), weight_loader

        @functools.wraps(weight_loader)
        def load(parameter: torch.Tensor, loaded: torch.Tensor, *shard, **more) -> None:
            own, part = str(own_name(layer, parameter)), next(iter((*shard, *more.values())), None)
            if own in PARTS and loaded.dtype != _dtype(own):
                stored = self._stored_name(layer, own, part)
                raise ValueError(f"{stored} is {loaded.dtype}, and must be {_dtype(own)}; {_AGAIN}")
            if own == ROWS:
                self._check_numbers(layer, part, loaded)
                self._numbers[part] = loaded.cpu().clone()  # the loader may use its memory again
            elif own == LOW:
                self._check_halves(layer, part, loaded)
                self._halves[part] = loaded.cpu().clone()
            else:
                checked(parameter, loaded, *shard, **more)
            self._arrived.setdefault(own, set()).add(part)

        return load

    def _check_numbers(self, layer: LinearBase, part: Any, loaded: torch.Tensor) -> None:
        """Raises ValueError if these are no numbers of rows of a part."""
        rows = _rows_of(layer, part)
        if loaded.dim() != 1 or not ((loaded >= 0) & (loaded < rows)).all() or not (loaded.diff() > 0).all():
            stored = self._stored_name(layer, ROWS, part)
            raise ValueError(f"{stored} does not hold ascending numbers below {rows}; {_AGAIN}")

    def _check_halves(self, layer: LinearBase, part: Any, loaded: torch.Tensor) -> None:
        """Raises ValueError if these are no lower halves of rows of this layer."""
        half = layer.input_size // 2
        if loaded.dim() != 2 or loaded.shape[1] != half:
            stored = self._stored_name(layer, LOW, part)
            raise ValueError(
                f"{stored} has shape {list(loaded.shape)}, but config.json makes it [n, {half}]; they are not of one "
                "model, convert it again"
            )

    def _check_complete(self, layer: LinearBase) -> None:
        """Raises ValueError for a tensor that is missing, or has not as many rows as its counterpart."""
        whole = set().union(*(parts for name, parts in self._arrived.items() if name not in (ROWS, LOW)))
        needed = dict.fromkeys(("weight_scale", PACKED, MULTIPLIER, OFFSET), whole)
        needed |= {ROWS: {*self._halves}, LOW: {*self._numbers}}
        for name, parts in needed.items():
            for part in parts - self._arrived.get(name, set()):
                raise ValueError(f"{self._stored_name(layer, name, part)} is missing; {_AGAIN}")
        for part, numbers in self._numbers.items():
            if len(numbers) != (found := len(self._halves[part])):
                stored = self._stored_name(layer, LOW, part)
                raise ValueError(f"{stored} has {found} rows, and {ROWS} beside it {len(numbers)}; {_AGAIN}")

    def _stored_shape(self, parameter: str, rows: int, columns: int) -> list[int]:
        groups = grouping.groups(columns, self._group_size)
        widths = {PACKED: columns // 2, MULTIPLIER: groups, OFFSET: groups}
        return [rows, widths[parameter]] if parameter in widths else super()._stored_shape(parameter, rows, columns)


def _rows_of(layer: LinearBase, part: Any) -> int:
    """Rows that the checkpoint has of a linear, or of that part.

    Raises:
        ValueError: vLLM merges parts that are not known here.
    """
    if (rows := stored_rows(layer, part)) is None:
        raise ValueError(f"{getattr(layer, 'prefix', 'linear')}: how many rows its part {part!r} has is not known")
    return rows


def _dtype(parameter: str) -> torch.dtype:
    return fourbits.DTYPES[parameter.removeprefix("weight_")]
