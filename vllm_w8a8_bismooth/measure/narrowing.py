"""What four bits cost the predictions in each row of each linear, and which rows are worth eight.

A row ``n`` that is rounded to four bits changes the linear's output ``y_n`` by some ``d x``. With ``g``, the gradient
there of the log-probability of a token that the model itself would say, ``(g d x)^2 / 2`` is on average the KL
divergence that this causes (see :mod:`sensitivity`; MixLLM, arXiv 2412.14590, chooses rows by one budget over the whole
model, too). Costs of rows add up, so that bits are spent best on those rows that cost most for each bit they take.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

from vllm_w8a8_bismooth import grouping
from vllm_w8a8_bismooth.measure.passing import Passing
from vllm_w8a8_bismooth.method.grids import Stepped
from vllm_w8a8_bismooth.method.quantize import quantize_weight
from vllm_w8a8_bismooth.method.rows import Fold, Memory, Threads

Wide = Sequence[Mapping[str, torch.Tensor]]
"""Per block, linear -> int32 ``[n]``, ascending: its rows with eight bits."""


def error(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """fp32 ``[N, K]``: what rounding each row of an fp32 weight to the nearest 4-bit codes changes."""
    _, scale = quantize_weight(weight)
    wide = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    grid = Stepped.search(weight, scale.view(-1), wide, group_size, weight.new_ones(weight.shape[1]))
    return grid.rounded(weight).mul_(grid.scale.unsqueeze(1)).sub_(weight)


def change(weight: torch.Tensor, group_size: int, threads: Threads) -> torch.Tensor:
    """fp32 ``[N]``: the sum of squares of what four bits change in each row of a stored weight ``[N, K]``.

    What there is to go by where no activations are known.
    """

    def work(start: int, rows: int, pieces: Iterator[tuple[int, torch.Tensor]], memory: Memory) -> torch.Tensor:
        return torch.cat([error(piece, group_size).square_().sum(dim=1) for _, piece in pieces])

    return torch.cat(list(threads.over(weight, Fold(), work)))


def measure(
    passing: Passing, group_size: int, left: Mapping[str, float]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The cost of four bits in each row of a block, by its linears; and the gradients of what the block reads.

    Args:
        passing: through the block.
        group_size: of 4-bit rows.
        left: linear -> what compensation will leave of the cost of nearest codes, where it rounds.

    Returns:
        Linear -> fp32 ``[N]``, nats a token; and fp32 ``[draws, windows, length, hidden]``.
    """
    costs: dict[str, torch.Tensor] = {}
    errors: dict[str, torch.Tensor] = {}
    with passing.running() as running:
        modules = {running.built(name): name for name in passing.layer.linears}
        for module, linear in modules.items():
            inner, columns = running.block.get_submodule(module), passing.smoothing.fold(linear).columns
            assert isinstance(inner, torch.nn.Linear)
            weight = inner.weight.detach()
            found = error(weight if columns is None else weight * columns, group_size)
            errors[linear] = found if columns is None else found / columns
            costs[linear] = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def note(name: str, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen[name] = inputs[0], output

        hooks = [running.block.get_submodule(m).register_forward_hook(partial(note, n)) for m, n in modules.items()]
        before = torch.empty_like(passing.gradients)
        for i, leaf, out in running.windows():
            changes = {name: x.detach().flatten(0, -2) @ errors[name].T for name, (x, _) in seen.items()}
            outputs = [leaf, *(output for _, output in seen.values())]
            for draw, gradient in enumerate(passing.gradients[:, i]):
                kept = draw < len(passing.gradients) - 1
                carried, *slopes = torch.autograd.grad(out, outputs, gradient[None], retain_graph=kept)
                before[draw, i] = carried[0]
                for name, slope in zip(seen, slopes, strict=True):
                    costs[name] += (slope.flatten(0, -2) * changes[name]).square().sum(dim=0)
        for hook in hooks:
            hook.remove()
    count = 2 * passing.gradients[..., 0].numel()
    return {name: (left.get(name, 1.0) * cost / count).float() for name, cost in costs.items()}, before


def allot(
    costs: Sequence[Mapping[str, torch.Tensor]],
    columns: Sequence[Mapping[str, int]],
    bits: float,
    group_size: int,
) -> list[dict[str, torch.Tensor]]:
    """Give eight bits to those rows of a model that cost most in four, for each bit that they take.

    Args:
        costs: per block, linear -> fp32 ``[N]``, what four bits cost in each row.
        columns: per block, linear -> K.
        bits: of a weight, on average over all rows, scales and all.
        group_size: of 4-bit rows.

    Returns:
        :data:`Wide`. Of rows that cost the same, the first ones come first.

    Raises:
        ValueError: four bits in every row already take more; the message says how many.
    """
    places = [(index, linear) for index, block in enumerate(costs) for linear in block]
    sizes = [len(costs[index][linear]) for index, linear in places]
    of_four, of_eight = (
        torch.tensor([grouping.row_bits(columns[index][linear], group_size)[which] for index, linear in places])
        for which in (0, 1)
    )
    weights = sum(size * columns[index][linear] for size, (index, linear) in zip(sizes, places, strict=True))
    left = bits * weights - int((of_four * torch.tensor(sizes)).sum())
    if left < 0:
        raise ValueError(f"{(bits * weights - left) / weights:.3f}")
    more = (of_eight - of_four).repeat_interleave(torch.tensor(sizes))
    order = (torch.cat([costs[i][linear].double().cpu() for i, linear in places]) / more).argsort(
        descending=True, stable=True
    )
    wide = torch.zeros(len(order), dtype=torch.bool)
    wide[order[more[order].cumsum(0) <= left]] = True
    found: list[dict[str, torch.Tensor]] = [{} for _ in costs]
    for (index, linear), rows in zip(places, wide.split(sizes), strict=True):
        found[index][linear] = rows.nonzero().view(-1).int()
    return found
