"""What the compiler made of the CUDA GEMM kernels: the instructions they are built around, and none that they avoid."""

import math
import pathlib
import re
from typing import NamedTuple

import pytest

from tests.support.sass import dump  # which skips this module where there is no library or no cuobjdump

ROOT = pathlib.Path(__file__).parents[2]
CHANNEL, GROUP_128, GROUP_ANY = 0, 1, 2
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*(\w[\w.]*)(?: (0x[0-9a-f]+))?")
NAME = re.compile(r"gemm_(mma|wgmma)ILi(\d+)ELi(\d)ELb([01])E")


class Instruction(NamedTuple):
    """Address, name with all modifiers, and what it begins with if that is an address (of a branch)."""

    address: int
    name: str
    target: int | None


def kernels(architecture: str) -> dict[tuple[str, int, int, bool], list[Instruction]]:
    """(kind, tile, granularity, a_groups) -> code."""
    found, code = {}, []
    for line in dump("-sass", "-arch", architecture).splitlines():
        if "Function :" in line:
            name, code = NAME.search(line), []
            if name:
                found[name[1], int(name[2]), int(name[3]), name[4] == "1"] = code
        elif match := INSTRUCTION.match(line):
            code.append(Instruction(int(match[1], 16), match[2], int(match[3], 16) if match[3] else None))
    return found


def count(code: list[Instruction], prefix: str) -> int:
    return sum(each.name.startswith(prefix) for each in code)


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """What branches back go over again, each by itself."""
    back = [(each.target, each.address) for each in code if each.name.startswith("BRA") and each.target is not None]
    return [[e for e in code if first <= e.address <= last] for first, last in back if first < last]


def tiles() -> list[dict]:
    """The table in layout.h."""
    table = (ROOT / "csrc/cuda/layout.h").read_text().split("TILES[] = {")[1].split("};")[0]
    names = "warpgroups tokens weights warp_tokens warp_weights warps_k stages cluster".split()  # noqa: SIM905
    return [
        {"granularities": flags.split(" | ")} | dict(zip(names, map(int, numbers.split(", ")[:8]), strict=True))
        for numbers, flags in re.findall(r"\{((?:\d+, ){8})([CGANY |]+)\}", table)
    ]


def threads_of(tile: dict) -> int:
    if tile["warpgroups"]:
        return (tile["warpgroups"] + 1) * 128
    return tile["tokens"] * tile["weights"] // (tile["warp_tokens"] * tile["warp_weights"]) * tile["warps_k"] * 32


@pytest.fixture(scope="module")
def hopper():
    found = kernels("sm_90a")
    if not found:
        pytest.skip("not built for sm_90a")
    return found


@pytest.fixture(scope="module")
def ampere():
    found = kernels("sm_80")
    if not found:
        pytest.skip("not built for sm_80")
    return found


def test_every_kernel_is_there(hopper, ampere):
    expected = set()
    for index, tile in enumerate(tiles()):
        kind = "wgmma" if tile["warpgroups"] else "mma"
        for granularity, flag in enumerate(("C", "G", "ANY")):
            if flag in tile["granularities"]:
                expected |= {(kind, index, granularity, a_groups) for a_groups in {False, granularity > 0}}
    assert set(hopper) == set(ampere) == expected


def test_no_spills_and_registers_within_limits():
    """In every architecture: no stack, no local memory, and as many registers as the launch has."""
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump("-res-usage"))
    seen = 0
    for function, registers, stack, local in usage:
        if name := NAME.search(function):
            threads = threads_of(tiles()[int(name[2])])
            assert (stack, local) == ("0", "0") and int(registers) * threads <= 65536, function
            seen += 1
    assert seen


def test_wgmma_kernels_have_the_registers_that_they_hand_over(hopper):
    """setmaxnreg counts on 168 a thread: with fewer at launch, two warpgroups that multiply would wait for ever."""
    usage = re.findall(r"Function (\S+):\s+REG:(\d+)", dump("-res-usage", "-arch", "sm_90a"))
    registers = {function: int(number) for function, number in usage if "gemm_wgmma" in function}
    assert len(registers) == sum(kind == "wgmma" for kind, *_ in hopper)
    shared = {
        each: number for each, number in registers.items() if tiles()[int(NAME.search(each)[2])]["warpgroups"] > 1
    }
    assert set(shared.values()) == {168}, registers


def test_hopper_multiplies_with_wgmma_fed_by_tma(hopper):
    for (kind, index, granularity, a_groups), found in hopper.items():
        if kind == "wgmma":
            tile, where = tiles()[index], f"{index} {granularity} {a_groups}"
            steps = 4 * tile["warp_weights"] // 64
            assert count(found, f"IGMMA.64x{tile['tokens']}x32.S8.S8") == count(found, "IGMMA") == steps, where
            assert count(found, "UTMALDG.2D") and count(found, "STSM.16.MT88.4"), where
            assert (count(found, "UTMALDG.2D.MULTICAST") > 0) == (tile["cluster"] > 1), where
            assert count(found, "USETMAXREG") == (2 if tile["warpgroups"] > 1 else 0), where
            assert count(found, "WARPGROUP.DEPBAR") <= 2 * tile["warp_weights"] // 64, where  # no serialised wgmma
            assert count(found, "LDL") + count(found, "STL") == 0, where


@pytest.mark.parametrize("architecture", ["ampere", "hopper"])
def test_mma_kernels(architecture, request):
    for (kind, index, granularity, a_groups), found in request.getfixturevalue(architecture).items():
        if kind == "mma":
            tile, where = tiles()[index], f"{index} {granularity} {a_groups}"
            steps = 4 * (tile["warp_weights"] // 16) * (tile["warp_tokens"] // 8)
            assert count(found, "IMMA.16832.S8.S8") == count(found, "IMMA") == steps, where
            assert count(found, "LDGSTS.E.BYPASS.128") or count(found, "LDGSTS.E.BYPASS.LTC128B.128"), where
            assert count(found, "LDSM.16.M88.4") > 0, where
            assert count(found, "LDL") + count(found, "STL") == 0, where


@pytest.mark.parametrize("architecture", ["ampere", "hopper"])
def test_the_loop_over_k_copies_without_loops(architecture, request):
    """One loop multiplies, and none in it copies: each thread's copies follow each other, as many as it has."""
    for (kind, index, granularity, a_groups), found in request.getfixturevalue(architecture).items():
        if kind == "mma":
            tile, where = tiles()[index], f"{index} {granularity} {a_groups}"
            (body,) = (loop for loop in loops(found) if count(loop, "IMMA"))
            inner = [loop for loop in loops(found) if loop[-1] in body and loop != body]
            assert not any(count(loop, "LDGSTS") for loop in inner), where
            slices, weights, tokens = tile["warps_k"], tile["weights"], tile["tokens"]
            threads = threads_of(tile)
            copies = (weights + tokens) * slices * 8 // threads
            if granularity == GROUP_128:
                copies += math.ceil(weights * slices / threads)
                copies += math.ceil(tokens * slices / threads) if a_groups else 0
            assert count(body, "LDGSTS") == copies, where
            if (
                architecture == "ampere" and granularity != GROUP_ANY
            ):  # docs/results.md says how many; another nvcc may differ
                least, most = ((101, 258), (236, 542))[granularity]
                assert 0.9 * least < len(body) < 1.1 * most, (where, len(body))


def test_ampere_groups_convert_without_i2f(ampere):
    """Conversions of sums are slow there, and per group would double the kernel. (.RP: of an index, to divide it.)"""
    for (kind, index, granularity, a_groups), found in ampere.items():
        if kind == "mma" and granularity != CHANNEL:
            conversions = [each for each in found if each.name.startswith("I2F") and not each.name.endswith(".RP")]
            assert not conversions, f"{index} {granularity} {a_groups}: {conversions}"
