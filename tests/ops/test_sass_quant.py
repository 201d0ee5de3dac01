"""Machine code of the quantization kernels: what a GPU would show as slow, seen without one."""

import re

import pytest

from tests.support.sass import dump


@pytest.fixture(scope="module", params=["sm_80", "sm_90a"])
def kernels(request) -> dict[str, dict]:
    """Each kernel, "Source<number>,ITEMS", with its instructions, and registers and stack bytes of a thread."""
    found = {}
    usage = dump("-res-usage", "-arch", request.param)
    for name, registers, stack in re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+)", usage):
        if "quantize" in name:
            found[short(name)] = {"registers": int(registers), "stack": int(stack), "arch": request.param}
    if not found:
        pytest.skip(f"not built for {request.param}")
    sass = dump("-sass", "-arch", request.param)
    for name, body in re.findall(r"Function : (\S+)(.*?)(?=Function :|\Z)", sass, re.S):
        if "quantize" in name:
            found[short(name)]["code"] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", body)
    return found


def short(mangled: str) -> str:
    source, number, items = re.search(r"(Plain|SiluMul|RmsNorm)I(f|NS_4[BF][fp]16E)EELi(\d)", mangled).groups()
    return f"{source}<{'float' if number == 'f' else number[4:8]}>,{items}"


def test_every_kernel_is_there(kernels):
    names = {
        f"{source}<{number}>,{items}"
        for source in ("Plain", "SiluMul", "RmsNorm")
        for number in ("float", "Bf16", "Fp16")
        for items in (1, 4)
    }
    assert set(kernels) == names


def test_registers_only(kernels):
    for name, kernel in kernels.items():
        assert kernel["stack"] == 0, name
        assert not [i for i in kernel["code"] if i.startswith(("LDL", "STL"))], name
        source, number, _ = re.split("[<>,]+", name)
        threads = 512 if source == "RmsNorm" or number == "float" else 896 if source == "SiluMul" else 1024
        assert kernel["registers"] * threads <= 65536, name


def test_wide_accesses_and_cheap_conversions(kernels):
    for name, kernel in kernels.items():
        code = kernel["code"]
        assert {i for i in code if i.startswith("LDG")} == {"LDG.E.128"}, name
        assert {i for i in code if i.startswith("STG")} <= {"STG.E", "STG.E.64", "STG.E.128"}, name
        # rounding by an addition, silu without special functions but the reciprocal (and a norm's one root)
        assert not [i for i in code if i.startswith(("F2I", "I2F.", "MUFU.EX2"))], name


def test_loads_are_under_way_together(kernels):
    for number in ("Bf16", "Fp16"):
        code = kernels[f"SiluMul<{number}>,4"]["code"]
        loads = [i for i, op in enumerate(code) if op == "LDG.E.128"]
        assert loads[5] < code.index("MUFU.RCP"), number


def test_overlaps_with_neighbours_on_hopper(kernels):
    for name, kernel in kernels.items():
        if kernel["arch"] == "sm_90a":
            assert kernel["code"].count("PREEXIT") == 1 and kernel["code"].count("ACQBULK") == 1, name
