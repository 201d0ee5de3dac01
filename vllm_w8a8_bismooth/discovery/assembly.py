"""From what was found in a small model to the record of a real one: the checkpoint's names, real sizes."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from vllm_w8a8_bismooth.discovery.block import Block, Tie
from vllm_w8a8_bismooth.discovery.record import Layer, Site, Stored, each, runs
from vllm_w8a8_bismooth.discovery.rules import Matrix, reason
from vllm_w8a8_bismooth.discovery.storage import Region
from vllm_w8a8_bismooth.discovery.titles import titled
from vllm_w8a8_bismooth.discovery.views import Shown, is_turned
from vllm_w8a8_bismooth.discovery.watch import Unit
from vllm_w8a8_bismooth.model.construction import Part
from vllm_w8a8_bismooth.model.layers import Runs
from vllm_w8a8_bismooth.model.names import template


class Unfit(Exception):
    """A site that has no form at real size; the text says why."""


class Assembly:
    """Makes the record of one block.

    Args:
        block: of the small model.
        regions: checkpoint's tensor inside the block -> where its values are, by names inside the block.
        real: checkpoint's tensor inside the block -> shape, of the real model.
        experts: in the small model's and the real model's mixtures; 0 for none.
        ties: that hold in it.
        counts: numbers of things that the config names, and small multiples.
    """

    def __init__(
        self,
        block: Block,
        regions: Mapping[str, list[Region]],
        real: Mapping[str, tuple[int, ...]],
        experts: tuple[int, int],
        ties: Iterable[Tie],
        counts: Collection[int] = (),
    ):
        shown = Shown.of(block, regions, real, ties)
        regions, real = shown.regions, shown.shapes
        self._block, self._regions, self._views, self._kept = block, regions, shown.views, shown.kept
        self._ties = ties
        self._few, self._many = experts
        self._counts = counts
        self.real = {template(name): shape for name, shape in real.items()}
        self._small = {
            template(name): self._shape(found)
            for name, found in regions.items()
            if found and found[0].parameter in block.parameters
        }
        self._of: dict[tuple[str, int | None], list[Region]] = {}
        for found in regions.values():
            for region in found:
                self._of.setdefault((region.parameter, region.expert), []).append(region)

    @property
    def experts(self) -> int:
        """How many each name with ``{}`` stands for."""
        return self._many if any("{}" in name for name in self.real) else 0

    def _shape(self, found: list[Region]) -> tuple[int, ...]:
        """Of a tensor of the small model."""
        region, total = found[0], sum(r.rows[1] for r in found)
        whole = self._block.parameters[region.parameter]
        if not whole.ndim:
            return ()
        if region.transposed:
            return (*whole.shape[: len(whole.shape) - 2 if region.expert is None else 0], total, whole.shape[-2])
        return (total, *(whole.shape[1:] if region.expert is None else whole.shape[2:]))

    # -- sites

    def site(self, tie: Tie) -> Site | None:
        """A tie as the checkpoint's site; ``None`` if nothing that becomes INT8 takes part.

        Raises:
            Unfit: it has no such form.
        """
        rows = list(tie.rows)
        place = {row: channel for channel, row in enumerate(rows)}
        columns: list[int] | None = None
        consumers: dict[str, None] = {}
        seen: dict[str, set[str]] = {}
        for unit, pairs in tie.consumers.items():
            width = self._block.matrix(unit).shape[1]
            channels = [-1] * width
            for row, column in pairs:
                channels[column] = place[row]
            if -1 in channels:
                raise Unfit(f"only {len(pairs)} of {width} columns of {unit.name} take a factor")
            if columns is not None and channels != columns:
                raise Unfit("its consumers hold the channels in different order")
            columns = channels
            for region in self._regions_of(unit.name, unit.expert):
                consumers[_plain(template(region.tensor))] = None
                seen.setdefault(_plain(template(region.tensor)), set()).add(region.tensor)
        assert columns is not None
        producer, held = self._producer(tie.producer, rows)
        if "{}" not in producer:
            for name, tensors in seen.items():
                if "{}" in name and len(tensors) < self._few and tie.producer not in self._block.axes:
                    # Experts that are modules of their own are all read from one gain.
                    raise Unfit(f"it feeds {len(tensors)} of {self._few} experts")
        ratio = self._ratio(producer, consumers)
        every = held == list(range(self._rows_of(producer)))
        return Site(
            name="",
            producer=producer,
            consumers=tuple(consumers),
            rows=None if every else _enlarged(held, ratio),
            columns=None if columns == list(range(len(rows))) else _enlarged(columns, ratio),
            offset=tie.offset,
            power=tie.power,
        )

    def _regions_of(self, parameter: str, expert: int | None) -> list[Region]:
        found = self._of.get((parameter, expert)) or self._of.get((parameter, None))
        if not found:
            raise Unfit(f"the checkpoint's place of {parameter} is not known")
        return found

    def _producer(self, parameter: str, rows: list[int]) -> tuple[str, list[int]]:
        """The tensor that has these rows of a parameter's product, and which of its rows they are."""
        whole = self._block.parameters[parameter]
        found = self._regions_of(parameter, 0 if whole.ndim > 2 else None)
        if len(found) == 1:
            return _plain(template(found[0].tensor)), rows
        if parameter in self._block.axes and is_turned(self._block, found[0]):
            raise Unfit(f"{parameter} is stored in parts across its rows")
        for region in found:
            first, count = region.rows
            if first <= rows[0] and rows[-1] < first + count:
                return _plain(template(region.tensor)), [row - first + region.start for row in rows]
        raise Unfit(f"its rows are in several tensors of {parameter}")

    def _rows_of(self, name: str) -> int:
        tensor = self._tensor(name)
        return self._small[tensor][-2:][0]

    def _tensor(self, name: str) -> str:
        return name if name in self._small else f"{name}.weight"

    def _ratio(self, producer: str, consumers: Iterable[str]) -> int:
        """How many channels of the real model each of the small one stands for."""
        tensor = self._tensor(producer)
        found = {self.real[tensor][-2:][0] / self._small[tensor][-2:][0]}
        for name in map(self._tensor, consumers):
            found.add(self.real[name][-1] / self._small[name][-1])
        ratio = int(max(found))
        if found != {ratio}:
            raise Unfit(f"its sizes are {sorted(found)} times those of the model that was searched")
        return ratio

    def ties(self, site: Site) -> list[Tie]:
        """The inverse of :meth:`site`: a tie, or several where experts are modules of their own.

        Raises:
            Unfit: it is not a site as :meth:`site` makes them.
        """
        if unknown := [name for name in (site.producer, *site.consumers) if not self._small.get(self._tensor(name))]:
            raise Unfit(f"{unknown[0]} is no part of such a block")
        if not_matrices := [name for name in site.consumers if len(self._small[self._tensor(name)]) < 2]:
            raise Unfit(f"{not_matrices[0]} is no matrix")
        ratio, every = self._ratio(site.producer, site.consumers), self._rows_of(site.producer)
        rows = list(range(every)) if site.rows is None else _reduced(site.rows, ratio, every)
        channels = None if site.columns is None else _reduced(site.columns, ratio, self._widest)
        found: dict[str, Tie] = {}
        for e in range(self._few) if "{}" in site.producer else [None]:
            parameter, own = self._own_rows(_numbered(self._tensor(site.producer), e), rows)
            consumers = dict(found[parameter].consumers) if parameter in found else {}
            for name in site.consumers:
                numbers = range(self._few) if "{}" in name and e is None else [e]
                for unit in (unit for n in numbers for unit in self._units(_numbered(self._tensor(name), n))):
                    held = list(range(len(own))) if channels is None else channels
                    if len(held) != self._block.matrix(unit).shape[1] or max(held, default=0) >= len(own):
                        raise Unfit(f"its rows are not as many as {name} has columns for")
                    consumers[unit] = tuple((own[channel], column) for column, channel in enumerate(held))
            found[parameter] = Tie(parameter, tuple(sorted(own)), consumers, site.offset, site.power)
        for tie in found.values():
            if unnamed(self.site(tie)) != unnamed(site):
                raise Unfit("it is not written as such a site must be: all consumers, rows in their order")
        return list(found.values())

    @property
    def _widest(self) -> int:
        return max((max(shape) for shape in self._small.values() if len(shape) > 1), default=0)

    def _own_rows(self, tensor: str, rows: list[int]) -> tuple[str, list[int]]:
        """The parameter that has these rows of a tensor of the small model, and which of its rows they are."""
        for region in self._regions.get(tensor, []):
            count = region.rows[1]
            if rows and region.start <= min(rows) and max(rows) < region.start + count:
                return region.parameter, [row - region.start + region.rows[0] for row in rows]
        raise Unfit(f"the model has no parameter with these rows of {_plain(tensor)}")

    def _units(self, tensor: str) -> list[Unit]:
        """The matrices of the small model that a tensor is a part of."""
        found = []
        for region in self._regions.get(tensor, []):
            if region.parameter not in self._block.axes:
                raise Unfit(f"nothing was seen to be multiplied with {_plain(tensor)}")
            units = self._block.units(region.parameter)
            found += [unit for unit in units if region.expert in (None, unit.expert)]
        return found

    # -- everything else

    def layer(self, writers: Collection[str]) -> tuple[Layer, dict[str, str]]:
        """The record, and the sites that have no form in it -> why."""
        linears, floats = self._matrices()
        vectors = {
            _plain(name): self.real[name][0]
            for name in self.real
            if len(self.real[name]) == 1 and name.endswith("weight") and "norm" in self._owner(name).lower()
        }
        sites: dict[Site, None] = {}
        dropped = {}
        for tie in self._ties:
            try:
                site = self.site(tie)
            except Unfit as error:
                dropped[tie.producer] = str(error)
                continue
            assert site is not None
            if (used := [name for name in (site.producer, *site.consumers) if name in linears]) and used != [
                site.producer
            ]:
                ordered = sorted(site.consumers, key=lambda name: name not in linears)
                sites[replace(site, consumers=tuple(ordered))] = None
                if site.producer not in linears and site.producer not in floats:
                    vectors[site.producer] = self.real[self._tensor(site.producer)][0]
        behind_linears_first = sorted(sites, key=lambda site: site.producer in vectors)
        names = {_plain(template(r.tensor)) for p in writers for e in (None, 0) for r in self._of.get((p, e), [])}
        return (
            Layer(
                tensors=dict(sorted(self.real.items())),
                linears=linears,
                floats=floats,
                vectors=dict(sorted(vectors.items())),
                sites=titled(behind_linears_first),
                experts=frozenset(name for name in linears if "{}" in name),
                writers=frozenset(name for name in names if name in linears or name in vectors),
            ),
            dropped,
        )

    def _matrices(self) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
        linears: dict[str, tuple[int, int]] = {}
        floats: dict[str, str] = {}
        names = sorted(self.real)
        for name in names:
            shape = self.real[name]
            if len(shape) < 2:
                continue
            seen = any(region.parameter in self._block.axes for region in self._found(name))
            rows, columns = shape[-2:] if seen else (0, 0)
            few = self._small[name][-2] if seen else 0
            inside = name.rpartition(".")[0]
            beside = frozenset(
                n[len(around) :].split(".")[0] for around in [_around(inside)] for n in names if n.startswith(around)
            )
            matrix = Matrix(name, shape, rows, columns, self._is_counted(rows, few), self._owner(name), beside)
            if why := self._kept.get(name) or reason(matrix):
                floats[_plain(name)] = why
            else:
                linears[_plain(name)] = (rows, columns)
        if why := next((why for name, why in floats.items() if "{}" in name), None):  # vLLM serves experts alike
            floats |= {name: why for name in linears if "{}" in name}
            linears = {name: shape for name, shape in linears.items() if "{}" not in name}
        return linears, floats

    def _is_counted(self, rows: int, few: int) -> bool:
        """Whether rows are not a width: as many as in the small model, or one for each expert."""
        return rows == 1 or (rows == few and rows in self._counts) or 0 < rows == self._many != few == self._few

    def _found(self, name: str) -> list[Region]:
        return next((found for tensor, found in self._regions.items() if template(tensor) == name), [])

    def _owner(self, name: str) -> str:
        """The class of the module that has a tensor."""
        for region in self._found(name):
            path = region.parameter.rpartition(".")[0]
            return type(self._block.module.get_submodule(path)).__name__
        return ""

    def stored(self) -> Stored:
        """Where the checkpoint has each parameter, at real size."""
        parameters: dict[str, dict[Part, None]] = {}
        for found in self._regions.values():
            for region in found:
                parts = parameters.setdefault(template(region.parameter), {})
                parts[self._part(region)] = None
        return Stored({name: tuple(parts) for name, parts in parameters.items()}, self._views)

    def _part(self, region: Region) -> Part:
        name = template(region.tensor)
        whole = self._block.parameters.get(region.parameter)
        if whole is None:
            return Part(name)
        length = whole.shape[-1 if region.transposed else 0 if region.expert is None else 1]
        if region.rows == (0, length):
            return Part(name, transposed=region.transposed)
        axis = -2 if region.transposed else 0  # a convolution's rows are its first axis
        ratio = self.real[name][axis] // self._small[name][axis]
        first, count = region.rows
        return Part(name, (first * ratio, count * ratio), region.start * ratio, region.transposed)


def _numbered(name: str, expert: int | None) -> str:
    return name if expert is None else name.replace("{}", str(expert))


def unnamed(site: Site | None) -> Site | None:
    """Without its name, and with its consumers and runs in one order."""
    if site is None:
        return None
    columns = None if site.columns is None else runs(each(site.columns))
    rows = None if site.rows is None else runs(each(site.rows))
    return replace(site, name="", consumers=tuple(sorted(site.consumers)), rows=rows, columns=columns)


def _reduced(given: Runs, ratio: int, most: int) -> list[int]:
    """The inverse of :func:`_enlarged`, with indices below ``most`` and no more than ``most`` of them.

    Raises:
        Unfit: they are others.
    """
    if sum(length for _, length in given) > most * ratio or any(
        start < 0 or length <= 0 or start % ratio or length % ratio or start + length > most * ratio
        for start, length in given
    ):
        raise Unfit(f"its rows or columns are not whole multiples of {ratio}, or beyond the sizes of its tensors")
    return [index for start, length in given for index in range(start // ratio, (start + length) // ratio)]


def _plain(name: str) -> str:
    return name.removesuffix(".weight")


def _around(module: str) -> str:
    """What the names beside a module begin with."""
    parent = module.rpartition(".")[0]
    return f"{parent}." if parent else ""


def _enlarged(indices: list[int], ratio: int) -> Runs:
    """Runs at real size, where each index stands for ``ratio`` consecutive ones."""
    return tuple((start * ratio, length * ratio) for start, length in runs(indices))
