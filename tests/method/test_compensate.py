"""Rounding that makes up for its errors: against the definition, and better where it says that it is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_w8a8_bismooth.method import compensate
from vllm_w8a8_bismooth.method.compensate import Compensation, Gram
from vllm_w8a8_bismooth.method.grids import REACH, Even
from vllm_w8a8_bismooth.method.quantize import dequantize_weight, quantize_folded, quantize_weight
from vllm_w8a8_bismooth.method.rows import Fold, Threads


def inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows whose channels go together, some much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, max(1, columns // 4), generator=generator)
    mixed = few @ torch.randn(few.shape[1], columns, generator=generator)
    return mixed * torch.logspace(-1, 1, columns) + 0.05 * torch.randn(tokens, columns, generator=generator)


def gram_of(rows: torch.Tensor) -> Gram:
    gram = Gram.none(rows.shape[1])
    for piece in rows.split(100):
        gram.add(piece)
    return gram


def rounded(weight: torch.Tensor, compensation: Compensation, group_size: int | None = None) -> torch.Tensor:
    """The weight that its codes stand for, by way of :func:`quantize_folded`."""
    codes = torch.empty_like(weight, dtype=torch.int8)
    scales = torch.empty(len(weight), weight.shape[1] // (group_size or weight.shape[1]))

    def take(start: int, some: torch.Tensor, scale: torch.Tensor) -> None:
        codes[start : start + len(some)], scales[start : start + len(some)] = some, scale

    quantize_folded(weight, Fold(), group_size, take, compensation=compensation)
    return dequantize_weight(codes, scales)


def test_the_factor_is_of_the_damped_inverse():
    gram = gram_of(inputs(300, 24))
    (products,), made = gram.products, Compensation.of(Gram([*gram.products]), damping=0.02)
    (order,), (factor,) = made.orders, made.factors
    h = products.double()[order][:, order]
    h.diagonal().add_(0.02 * float(h.diagonal().mean()))
    u = factor.double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(u.T @ u, h.inverse(), rtol=1e-3, atol=1e-4 * float(h.inverse().abs().max()))
    assert (h.diagonal().diff() <= 0).all()


@pytest.mark.parametrize("group_size", [None, 32])
def test_columns_one_by_one_give_the_same(group_size):
    """The paper's recursion, in fp64 and without blocks of columns: eq. 2 and 3 of arXiv 2210.17323.

    A row has the same codes up to one that lies between two, where fp32 takes the other, and what follows makes up for
    that.
    """
    rows = inputs(600, 160)
    weight = torch.randn(5, 160, generator=torch.Generator().manual_seed(1))
    made, (products,) = Compensation.of(gram_of(rows)), gram_of(rows).products
    (order,) = made.orders
    _, scale = quantize_weight(weight, group_size)
    h = products.double()[order][:, order]
    h.diagonal().add_(0.01 * float(h.diagonal().mean()))
    left, columns = weight.double()[:, order], 160
    expected, between = torch.empty_like(left), torch.empty_like(left)
    inverse = h.inverse()
    for j in range(columns):
        step = scale.double()[:, int(order[j]) // (group_size or columns)]
        own, now = weight.double()[:, int(order[j])] / step, left[:, j] / step
        nearest, code = own.round(), now.round()
        between[:, j] = torch.stack([(value - value.floor() - 0.5).abs() for value in (own, now)]).amin(dim=0)
        expected[:, j] = torch.clamp(code, nearest - REACH, nearest + REACH).clamp(-127, 127)
        error = (left[:, j] - expected[:, j] * step) / inverse[j, j]
        left[:, j:] -= error.unsqueeze(1) * inverse[j, j:]
        # Row and column j leave the inverse (eq. 3).
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    found = made.round(weight, Even(scale))[:, order]
    differs = found.double() != expected
    assert (found.double() - expected).abs().max() <= 2 * REACH and differs.float().mean() < 0.05
    first = differs.int().argmax(dim=1)
    assert (between[range(len(weight)), first] < 1e-2)[differs.any(dim=1)].all()


@given(seed=st.integers(0, 2**16), group_size=st.sampled_from([None, 32]))
def test_the_outputs_error_shrinks(seed, group_size):
    rows = inputs(500, 64, seed)
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(seed + 1))
    sizes = rows.square().mean(dim=1, keepdim=True).sqrt()
    nearest = dequantize_weight(*quantize_weight(weight, group_size))
    better = rounded(weight, Compensation.of(gram_of(rows)), group_size)

    def error(w: torch.Tensor) -> float:
        return float(((rows / sizes) @ (w - weight).T).square().mean())

    assert error(better) < 0.6 * error(nearest)
    _, scale = quantize_weight(weight, group_size)
    steps = scale.repeat_interleave(64 // scale.shape[1], dim=1)
    assert float(((better - nearest) / steps).abs().max()) <= REACH + 1e-3


def test_inputs_that_do_not_go_together_change_nothing():
    gram = Gram([torch.diag(torch.linspace(1, 2, 48))])
    weight = torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded(weight, Compensation.of(gram)), dequantize_weight(*quantize_weight(weight)))


@pytest.mark.parametrize("kind", ["unused", "one token", "equal channels", "huge"])
def test_inputs_that_say_little(kind):
    """What H cannot be factored by, or says nothing of, still gives codes, and no worse than the nearest ones."""
    rows = inputs(400, 32)
    if kind == "unused":
        rows[:, ::2] = 0
    elif kind == "one token":
        rows = rows[:1]
    elif kind == "equal channels":
        rows = rows[:, :1].expand(-1, 32).contiguous()
    else:
        rows *= 1e15
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    better = rounded(weight, Compensation.of(gram_of(rows)))
    nearest = dequantize_weight(*quantize_weight(weight))
    sizes = rows.square().mean(dim=1, keepdim=True).sqrt()
    errors = [float(((rows / sizes) @ (w - weight).T).square().mean()) for w in (better, nearest)]
    assert better.isfinite().all() and errors[0] <= errors[1]


def test_no_inputs_at_all_are_the_nearest():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    assert torch.equal(rounded(weight, Compensation.of(Gram.none(32))), dequantize_weight(*quantize_weight(weight)))


def test_a_fold_is_of_the_inputs_too():
    """Weights times s on inputs over s: the outputs are the same, and so is what they weigh."""
    rows, s = inputs(300, 48), torch.logspace(-1, 1, 48)
    sizes = rows.square().mean(dim=1, keepdim=True).sqrt()
    scaled = rows / sizes / s
    (found,) = gram_of(rows).scaled(1 / s).products
    torch.testing.assert_close(found, scaled.T @ scaled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("channels", "widest", "widths"), [(8, 8, [8]), (20, 8, [7, 7, 6]), (28672, 4096, [4096] * 7)])
def test_channels_are_shared_out(monkeypatch, channels, widest, widths):
    monkeypatch.setattr(compensate, "WIDEST", widest)
    assert compensate.parts(channels) == widths


@pytest.mark.parametrize("group_size", [None, 32])
def test_parts_are_rounded_each_for_itself(monkeypatch, group_size):
    rows, weight = inputs(500, 96), torch.randn(12, 96, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(compensate, "WIDEST", 40)
    found = rounded(weight, Compensation.of(gram_of(rows)), group_size)
    sizes = rows.square().mean(dim=1, keepdim=True).sqrt()
    _, scale = quantize_weight(weight, group_size)
    for start in range(0, 96, 32):
        part = slice(start, start + 32)
        alone = Gram([(rows / sizes)[:, part].T @ (rows / sizes)[:, part]])
        steps = scale if group_size is None else scale[:, start // 32 : start // 32 + 1]
        torch.testing.assert_close(found[:, part], Compensation.of(alone).round(weight[:, part], Even(steps)) * steps)


def test_threads_do_not_change_the_codes():
    weight, made = torch.randn(1500, 96), Compensation.of(gram_of(inputs(300, 96)))
    alone = rounded(weight, made)
    codes = torch.empty_like(weight, dtype=torch.int8)

    def take(start: int, some: torch.Tensor, scale: torch.Tensor) -> None:
        codes[start : start + len(some)] = some

    with Threads() as threads:
        quantize_folded(weight, Fold(), None, take, threads, made)
    assert torch.equal(dequantize_weight(codes, quantize_weight(weight)[1]), alone)


def test_the_loss_is_what_the_scales_leave():
    """Codes that make up for errors lie further from the weights; that is no reason to call a linear broken."""
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(4))
    made = Compensation.of(gram_of(inputs(500, 64)))
    losses = [quantize_folded(weight, Fold(), compensation=compensation) for compensation in (None, made)]
    assert losses[0].column_error() == losses[1].column_error()
    found = [dequantize_weight(*quantize_weight(weight)), rounded(weight, made)]
    errors = [float((w - weight).double().square().sum()) for w in found]
    assert [loss.written for loss in losses] == pytest.approx(errors, rel=1e-4) and errors[0] < errors[1]
