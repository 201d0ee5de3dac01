"""Which kernels are registered in builds of torch for GPUs, which are pretended here; a missing Triton is named."""

import json
import os
import subprocess
import sys

import pytest

from vllm_w8a8_bismooth import ops

LOOK = """
import json, sys, torch
setattr(torch.version, sys.argv[1], "1.2")
if sys.argv[2] == "absent":
    sys.modules["triton"] = None
from vllm_w8a8_bismooth import ops
from vllm_w8a8_bismooth.ops import schema
registered = torch._C._dispatch_has_kernel_for_dispatch_key
print(json.dumps({
    device: {
        name: (ops.server(device, name), registered(f"w8a8_bismooth::{name}", device.upper()))
        for name in schema.OPERATIONS
    }
    for device in ("cpu", "cuda", "xpu")
}))
"""
OPERATIONS = {"quantize_activations", "rms_norm_quantize", "silu_mul_quantize", "scaled_mm", "experts"}


def look(build: str, triton: str) -> tuple[dict, str]:
    """(device -> operation -> who does it, and whether that is registered), and what was logged."""
    done = subprocess.run([sys.executable, "-c", LOOK, build, triton], capture_output=True, text=True, check=True)
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize(("build", "device"), [("cuda", "cuda"), ("hip", "cuda"), ("xpu", "xpu")])
def test_triton_does_what_was_not_compiled(build, device):
    pytest.importorskip("triton")
    found, log = look(build, "present")
    assert found[device].keys() == OPERATIONS
    for server, registered in found[device].values():
        assert registered and server in ("triton", "compiled")
    assert found[device]["experts"] == ["triton", True]  # which nobody compiles
    assert (found["cpu"]["scaled_mm"][0] == "compiled") == ops.has_kernel("cpu") and "triton" not in log


def test_without_triton_the_reference_is_not_silent():
    found, log = look("xpu", "absent")
    assert set(map(tuple, found["xpu"].values())) == {("reference", False)}
    (line,) = log.splitlines()
    assert "scaled_mm" in line and "on xpu run on the torch reference, which is slow: install the triton" in line


SWITCHED_OFF = """
import torch
from vllm_w8a8_bismooth import fourbits, ops
from vllm_w8a8_bismooth.ops import gate, reference
gate.settle("cpu")
assert not ops.has_kernel("cpu", "linear")
weight, scale = torch.randint(-127, 128, (24, 64), dtype=torch.int8), torch.rand(24, 2)
for silu_mul, quantize in ((False, reference.quantize_activations), (True, reference.silu_mul_quantize)):
    x = torch.randn(5, 64 << silu_mul).bfloat16()
    codes, a_scale = quantize(x, 32)
    expected = reference.scaled_mm(codes, weight, a_scale, scale, x.dtype)
    assert torch.equal(ops.linear(x, weight, scale, 32, silu_mul=silu_mul), expected)
    assert torch.equal(torch.ops.w8a8_bismooth.linear(x, weight, scale, 32, None, silu_mul), expected)
assert not ops.has_kernel("cpu", "linear_rows") and not ops.has_kernel("cpu", "scaled_mm_rows")
weight, scale = torch.randint(-8, 8, (24, 64), dtype=torch.int8), torch.rand(24, 1)
packed = ops.pack_rows(fourbits.pack(weight, torch.tensor([3]), 32))
x = torch.randn(5, 64)
codes, a_scale = reference.quantize_activations(x, None)
expected = reference.scaled_mm(codes, weight, a_scale, scale, x.dtype)
stored = scale[packed.order.long()]
assert torch.equal(ops.linear_rows(x, packed, stored), expected)
assert torch.equal(ops.scaled_mm_rows(codes, packed, a_scale, stored, x.dtype), expected)
"""


def test_switched_off_a_linear_is_composed():
    environment = os.environ | {"BISMOOTH_KERNELS": "off"}
    done = subprocess.run([sys.executable, "-c", SWITCHED_OFF], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_cpu_never_imports_it():
    code = "import sys; from vllm_w8a8_bismooth import ops; print(*(n for n in sys.modules if 'ops.triton' in n))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()
