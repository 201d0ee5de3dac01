"""Sites of a block, found by trying: scale a producer, compensate what its consumers read, and compare.

A producer (a gain, rows of a matrix) is multiplied by random factors. Its consumers are the matrices whose input
columns change by exactly those factors for every token; their columns are divided by them, wave after wave (a router
first, then the experts whose input it scales), until the block's output and every other matrix's input are what they
were.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from vllm_w8a8_bismooth.discovery.block import SAME, Block, Tie, differ
from vllm_w8a8_bismooth.discovery.elasticity import Elasticity
from vllm_w8a8_bismooth.discovery.watch import Unit

_EXACT = 1e-9
_POWERS = (1.0, 2.0)
"""relu(s x) is s relu(x), and relu(s x) ** 2 is s ** 2 relu(x) ** 2."""
_OFFSETS = (0.0, 1.0)
_WAVES = 6
_PROBES = 48
"""Rows that are tried, evenly, where derivatives point to none."""
_MOST_ROWS = 64
_SMALL = 1e-3
"""Of a column's largest input; smaller ones are sums that cancelled, and their ratios are inexact."""

_Label = tuple[int, int]
"""Expert (0 without) and row."""


def ties_of(block: Block, hints: Sequence[Tie] = ()) -> list[Tie]:
    """All that hold in a block.

    Args:
        block: as it was captured.
        hints: those of other blocks; where all of one producer's hold here too, they are not searched for again.
    """
    found: list[Tie] = []
    pointers = Pointers(block)
    for name in block.parameters:
        known = [tie for tie in hints if tie.producer == name and _fits(block, tie)]
        if known and block.change(known) < SAME and all(_is_complete(block, tie) for tie in known):
            found += known
        elif name in block.axes:
            found += _rows(block, name, pointers)
        elif block.is_gain(name):
            found += _gain(block, name)
    return found


class Pointers:
    """Rows at which the sites of a block are looked for.

    Args:
        block: as it was captured.
    """

    def __init__(self, block: Block):
        self._block = block
        self._found: dict[tuple[Unit, int], set[tuple[str, int]]] = {}
        try:
            self._elasticity: Elasticity | None = Elasticity(block)
            for unit in block.inputs:
                for column in {0, block.inputs[unit].shape[1] // 2}:
                    self.at(unit, column)
        except RuntimeError:  # something in it cannot be differentiated: all rows are looked at
            self._elasticity = None

    def of(self, name: str, count: int) -> list[int]:
        """Rows of a matrix that columns at the begin or in the middle of others' inputs are proportional to."""
        if self._elasticity is None:
            return list(range(0, count, max(1, count // _PROBES)))
        return sorted({row for rows in self._found.values() for other, row in rows if other == name})

    def at(self, unit: Unit, column: int) -> set[tuple[str, int]]:
        """(matrix, row) that a column is proportional to."""
        if self._elasticity is None:
            return set()
        if (unit, column) not in self._found:
            self._found[unit, column] = self._elasticity.rows(unit, column)
        return self._found[unit, column]


def _fits(block: Block, tie: Tie) -> bool:
    """Whether a block has the matrices of another block's site, of the same sizes."""
    if tie.producer not in block.parameters or not all(unit in block.inputs for unit in tie.consumers):
        return False
    rows = [block.parameters[tie.producer].numel()] if block.parameters[tie.producer].ndim == 1 else []
    rows = rows or [block.matrix(block.units(tie.producer)[0]).shape[0]]
    widths = {unit: 1 + max(column for _, column in pairs) for unit, pairs in tie.consumers.items()}
    return max(tie.rows) < rows[0] and all(block.matrix(u).shape[1] >= width for u, width in widths.items())


def _is_complete(block: Block, tie: Tie) -> bool:
    """Whether all matrices that read what the producer makes are among its consumers: no other input changes."""
    with block.kept():
        block.fold(tie)
        _, now = block.run()
        return all(differ(x, block.inputs[unit]) < _EXACT for unit, x in now.items() if unit not in tie.consumers)


def _follow(
    block: Block, s: Mapping[_Label, float], powers: Sequence[float]
) -> tuple[dict[Unit, list[tuple[_Label, int]]], float] | None:
    """After a producer was scaled by ``s``: find and compensate the consumers, for the caller to take back.

    Returns:
        Consumer -> (label, column) pairs, and the power; ``None`` if the block does not compute what it did.
    """
    found: dict[Unit, list[tuple[_Label, int]]] = {}
    labels, values = list(s), torch.tensor(list(s.values()), dtype=torch.float64)
    for _ in range(_WAVES):
        out, now = block.run()
        if differ(out, block.output) < SAME:
            silent = all(differ(x, block.inputs[unit]) < _EXACT for unit, x in now.items() if unit not in found)
            return (found, powers[0]) if found and silent else None
        new = {}
        for unit, x in now.items():
            if unit not in found and (match := _matched(x, block.inputs.get(unit), values, powers)):
                new[unit] = match
                powers = (match[2],)
        if not new:
            return None
        for unit, (factors, pairs, _) in new.items():
            found[unit] = [(labels[which], column) for which, column in pairs]
            block.scale_columns(unit, 1 / factors)
    return None


def _matched(
    x: torch.Tensor, before: torch.Tensor | None, values: torch.Tensor, powers: Sequence[float]
) -> tuple[torch.Tensor, list[tuple[int, int]], float] | None:
    """How an input's columns changed, if each by one factor for all tokens, which is 1 or one of ``values``.

    Returns:
        The columns' factors fp64 ``[K]``, (index into ``values``, column) pairs, and the power; ``None`` if not so.
    """
    if before is None or x.shape != before.shape or differ(x, before) < _EXACT:
        return None
    certain = before.abs() > _SMALL * before.abs().amax(0).clamp_min(1e-9)
    ratio = x / torch.where(certain, before, 1)
    low = torch.where(certain, ratio, torch.inf).amin(0)
    high = torch.where(certain, ratio, -torch.inf).amax(0)
    live = certain.any(0)
    if not live.any() or ((high - low)[live] > _EXACT * high[live].abs()).any():
        return None
    still = (high - 1).abs() < _EXACT
    for power in powers:
        gap, which = (high[:, None] / values**power - 1).abs().min(1)
        matched = live & ~still & (gap < _EXACT)
        if matched.any() and (matched | still | ~live).all():
            columns = matched.nonzero()[:, 0].tolist()
            return torch.where(matched, high, 1.0), [(int(which[c]), c) for c in columns], power
    return None


def _gain(block: Block, name: str) -> list[Tie]:
    """The site behind a vector, if there is one; it may be stored as what is added to one."""
    for offset in _OFFSETS:
        s = block.random(block.parameters[name].numel())
        with block.kept():
            block.scale_gain(name, s, offset)
            found = _follow(block, {(0, row): value for row, value in enumerate(s.tolist())}, (1.0,))
        if found:
            consumers = {u: tuple((row, column) for (_, row), column in pairs) for u, pairs in found[0].items()}
            rows = sorted({row for pairs in consumers.values() for row, _ in pairs})
            return [Tie(name, tuple(rows), consumers, offset)]
    return []


def _attempt(block: Block, name: str, rows: Sequence[int]) -> Tie | None:
    """The site behind these rows, if all of them are one."""
    experts = range(len(block.units(name)))
    s = block.random(len(experts), len(rows))
    with block.kept():
        block.scale_rows(name, list(rows), s)
        labels = {(e, row): s[e, i].item() for i, row in enumerate(rows) for e in experts}
        found = _follow(block, labels, _POWERS)
    if not found or {row for pairs in found[0].values() for (_, row), _ in pairs} != set(rows):
        return None
    consumers = {u: tuple((row, column) for (_, row), column in pairs) for u, pairs in found[0].items()}
    own = all(e == u.expert for u, pairs in found[0].items() for (e, _), _ in pairs) or len(experts) == 1
    return Tie(name, tuple(sorted(rows)), consumers, 0.0, found[1]) if own else None


def _rows(block: Block, name: str, pointers: Pointers) -> list[Tie]:
    """The sites behind a matrix's rows.

    Around each row that is pointed to, the longest run that passes is found, and the period in which such runs return
    (the values of each head). Columns of the consumers that are left without a factor point to further rows. Rows that
    pass alone and not together are several sites, of which a fold may use one (LFM2: B, C and x).
    """
    count = block.matrix(block.units(name)[0]).shape[0]
    todo, found, seen = pointers.of(name, count), list[Tie](), set[int]()
    if todo and (whole := _attempt(block, name, range(count))):
        return [whole]
    while todo and len(seen) < _MOST_ROWS:
        row = todo.pop(0)
        seen.add(row)
        if any(row in tie.rows for tie in found) or not _attempt(block, name, [row]):
            continue
        if tie := _around(block, name, row, count):
            found = _joined(block, name, [*found, tie])
            more = {r for unit, column in _uncovered(block, found) for n, r in pointers.at(unit, column) if n == name}
            todo += sorted(more - seen)
    return found


def _uncovered(block: Block, ties: Sequence[Tie]) -> list[tuple[Unit, int]]:
    """Of each consumer, the first column that takes no factor, if there is one."""
    taken: dict[Unit, set[int]] = {}
    for tie in ties:
        for unit, column in tie.columns:
            taken.setdefault(unit, set()).add(column)
    every = {unit: set(range(block.inputs[unit].shape[1])) for unit in taken}
    return [(unit, min(left)) for unit in taken if (left := every[unit] - taken[unit])]


def _around(block: Block, name: str, row: int, count: int) -> Tie | None:
    """The site of all rows that are to a period what those around ``row`` are."""
    first = _furthest(lambda n: bool(_attempt(block, name, range(row - n, row + 1))), row)
    last = _furthest(lambda n: bool(_attempt(block, name, range(row, row + n + 1))), count - 1 - row)
    start, length = row - first, first + last + 1
    for period in range(2 * length, count, length):
        other = start + period if start + period < count else start - period
        if other >= 0 and _attempt(block, name, [other]):
            again = [r for r in range(count) if (r - start) % period < length]
            if tie := _attempt(block, name, again):
                return tie
    return _attempt(block, name, range(start, start + length))


def _furthest(passes: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that passes, if all smaller ones do; 0 does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if passes(middle) else (low, middle - 1)
    return low


def _joined(block: Block, name: str, ties: Sequence[Tie]) -> list[Tie]:
    """The same rows in as few sites as pass together."""
    if len(ties) > 1 and (whole := _attempt(block, name, sorted(row for tie in ties for row in tie.rows))):
        return [whole]
    found: list[Tie] = []
    for tie in ties:
        for index, other in enumerate(found):
            if joined := _attempt(block, name, sorted({*other.rows, *tie.rows})):
                found[index] = joined
                break
        else:
            found.append(tie)
    return found
