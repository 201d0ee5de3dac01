"""Small real checkpoints, made by transformers with random weights and written to disk."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before transformers looks at it: models' own code is kept by the name of its folder, and other processes have others.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")
import torch
from hypothesis import HealthCheck, settings

from benchmarks.testbed import PYTHON
from benchmarks.testbed.plant import plant
from tests.support.conversion import convert
from tests.support.damage import edit_json
from tests.support.models import tiny_model, write_checkpoint
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.recipe import Recipe

# No deadline: machines are shared. On CI the examples are the same every time, elsewhere new ones are searched.
project = settings(
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("project", project)
settings.register_profile("quick", project, max_examples=25)  # by --hypothesis-profile, for every commit
settings.load_profile("project")


@pytest.fixture(scope="session", autouse=True)
def own_code() -> Iterator[None]:
    """Leave nothing of models' own code behind."""
    yield
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def vllm_cache(tmp_path_factory) -> Path:
    """One for all engines of a run: vLLM starts a process to look at a type of model, unless its cache knows it."""
    folder = tmp_path_factory.mktemp("vllm-cache")
    os.environ["VLLM_CACHE_ROOT"] = str(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def environment(vllm_cache) -> Iterator[None]:
    """What vLLM sets in a process that makes its configs (LD_PRELOAD, numbers of threads) ends with the module."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """``make_checkpoint("llama", dtype=..., sharded=..., **config)`` -> folder."""

    def make(model_type: str = "llama", dtype=torch.bfloat16, sharded: bool = True, **changes) -> Path:
        return write_checkpoint(tmp_path / "source", tiny_model(model_type, **changes), dtype, sharded)

    return make


@pytest.fixture
def calibration_text(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.txt"
    path.write_text("".join(chr(97 + (i * i) % 26) for i in range(4000)))
    return path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """The planted test bed, mixed and bi-smoothed, and the latter, with two linears left in float, also unmarked.

    The head of all that are converted is INT8, though the bed's is its embedding.
    """
    folder = tmp_path_factory.mktemp("serving")
    names = {name: folder / name for name in ("planted", "bismooth", "mixed", "unmarked")}
    plant(PYTHON.model, names["planted"])
    text = read_text(Path(PYTHON.model).parent / "calibration.txt")
    ignore = r"layers\.0\.(self_attn\.q|mlp\.down)_proj"
    bismooth = Recipe.of("bismooth", calibration_tokens=4096, ignore=ignore, head="int8")
    convert(names["planted"], names["bismooth"], bismooth, text)
    convert(names["planted"], names["mixed"], Recipe.of("mixed", group_size=32, head="int8"))
    convert(names["planted"], names["unmarked"], bismooth, text)
    edit_json(names["unmarked"] / "config.json", lambda c: c["quantization_config"].pop("bismooth"))
    return names


@pytest.fixture
def log(caplog, monkeypatch):
    """``log.messages`` are those of our logger, each once, whatever vLLM does with them."""
    # A library of vLLM's server (model_hosting_container_standards) raises the level of the root's handlers on import.
    caplog.set_level(logging.INFO, "vllm.w8a8_bismooth")
    ours = logging.getLogger("vllm.w8a8_bismooth")
    monkeypatch.setattr(ours, "propagate", False)
    ours.addHandler(caplog.handler)
    yield caplog
    ours.removeHandler(caplog.handler)


@pytest.fixture
def vllms_library() -> None:
    """For tests in which vLLM's own kernels run: its sources of another release are here without them."""
    from vllm import _custom_ops  # noqa: F401 -- loads them

    if not hasattr(torch.ops._C, "static_scaled_int8_quant"):
        pytest.skip("this vLLM is here without its compiled library")


@pytest.fixture
def on_rank(monkeypatch):
    """``on_rank(rank, size)``: vLLM parameters made from now on believe to be there."""

    def be(rank: int, size: int) -> None:
        for name, value in {"rank": rank, "world_size": size}.items():
            monkeypatch.setattr(f"vllm.model_executor.parameter.get_tensor_model_parallel_{name}", lambda v=value: v)

    return be
