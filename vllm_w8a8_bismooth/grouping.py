"""Group sizes: how many columns of a row share a scale.

``None`` is the whole row, here as in compressed-tensors: per-channel for weights, per-token for activations.
"""

SIZES = (32, 64, 128, 256, 512, 1024)
"""The sizes in use, which messages propose; any multiple of 32 works."""
OF_FOUR_BITS = SIZES[:3]
"""Columns of 4-bit rows that may share a step and an offset, see :mod:`fourbits`."""


def fits(columns: int, group_size: int | None) -> bool:
    """Whether rows of ``columns`` divide into such groups."""
    return group_size is None or (group_size > 0 and columns % group_size == 0)


def fitting(columns: int) -> list[int]:
    """Those of :data:`SIZES` that fit."""
    return [size for size in SIZES if fits(columns, size)]


def groups(columns: int, group_size: int | None) -> int:
    """How many scales a row of ``columns`` has.

    Raises:
        ValueError: ``columns`` is not a multiple of ``group_size``; the message names the sizes that would fit.
    """
    if not fits(columns, group_size):
        sizes = ", ".join(map(str, fitting(columns))) or "no usual size"
        raise ValueError(f"K = {columns} is not a multiple of group_size = {group_size}; {sizes} would fit")
    return 1 if group_size is None else columns // group_size


def row_bits(columns: int, group_size: int) -> tuple[int, int]:
    """Bits of a 4-bit row of so many columns, and of an 8-bit one beside such, their scale and number included."""
    four = 4 * columns + 16 * (columns // group_size) + 32
    return four, four + 4 * columns + 32
