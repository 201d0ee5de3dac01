"""Weights some of whose rows four bits hold."""

import torch


def weight(
    n: int, groups: int, group_size: int, share: float, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 ``[n, groups * group_size]`` in [-127, 127], and the ascending numbers of about that share of its rows.

    Four bits hold all others, whose steps are of all widths that a code allows.
    """
    m = torch.randint(1, 17, (n, groups, 1), generator=draw)
    wide = torch.rand(n, groups, 1, generator=draw).lt(0.1)
    m = torch.where(wide, torch.randint(17, 255, m.shape, generator=draw), m)
    top = (254 // m).clamp(max=15)
    q = (torch.rand(n, groups, group_size, generator=draw) * (top + 1)).floor().long()
    o = (torch.rand(n, groups, 1, generator=draw) * (255 - top * m)).floor().long() - 127
    codes = (q * m + o).view(n, -1).to(torch.int8)
    rows = torch.rand(n, generator=draw).lt(share).nonzero().view(-1)
    codes[rows] = torch.randint(-127, 128, (len(rows), codes.shape[1]), generator=draw).to(torch.int8)
    return codes, rows
