"""What is shown of a family: its sites keep the function, conversions pass their check, calibration runs the model, and
vLLM serves the result."""

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import emulate
from tests.support.families import Family
from tests.support.folding import smoothed_copy
from tests.support.predictions import divergence
from tests.support.workers import engines
from vllm_w8a8_bismooth.api import convert, verify
from vllm_w8a8_bismooth.checkpoint.files import CONFIG, read_json
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.discovery.discover import discover
from vllm_w8a8_bismooth.measure.calibration import Calibration, Given
from vllm_w8a8_bismooth.measure.perturbation import units
from vllm_w8a8_bismooth.method.rows import Threads

SOURCE, CALIBRATED = "source", "calibrated"
METHODS = {
    "rtn": dict(method="rtn"),
    "data-free": dict(calibration="none"),
    CALIBRATED: dict(calibration_tokens=512),
}
"""How each family is converted: arguments of ``convert``; the last one's lacks the text. vLLM serves the last."""
WINDOWS = np.random.default_rng(3).integers(2, 160, (4, 41))
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_TOKENS = torch.randint(2, 150, (2, 40), generator=torch.Generator().manual_seed(2))


@dataclass
class Proof:
    """What was found and measured of one family without vLLM.

    Attributes:
        family: its name.
        discovery: seconds that finding its sites took.
        sites: in its blocks, with ``{}`` for numbers -> how many of its blocks have it.
        linears: that become INT8.
        floats: other matrices inside the blocks, with ``{}`` for numbers -> why they stay in float.
        outside: parts outside the blocks that hold matrices: their names' beginnings.
        function: relative change of the logits by folds at all sites, stored in fp32 and computed in fp64.
        stream: largest relative distance of what calibration hands from block to block to what the model does; ``None``
            where there is no calibration.
        converted: way of conversion -> INT8 linears.
        faults: what ``verify`` finds in the results.
        seconds: that all this took.
    """

    family: str
    discovery: float = 0.0
    sites: dict[str, int] = field(default_factory=dict)
    linears: int = 0
    floats: dict[str, str] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    function: float = 0.0
    stream: float | None = None
    converted: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def prove(family: Family, folder: Path, text: Path) -> Proof:
    """All that there is to show of a family without vLLM.

    Args:
        family: whose model is made.
        folder: for the model (``source``), and one of each of :data:`METHODS`.
        text: for calibration.
    """
    started, proof = time.monotonic(), Proof(family.name)
    path = family.write(folder / SOURCE)
    proof.discovery = discover(read_json(path / CONFIG)).seconds
    source = Source(path)
    _describe(source, proof)
    smoothed_copy(path, folder / "folded")
    before, after = (_logits(folder / name) for name in (SOURCE, "folded"))
    proof.function = _distance(after, before)
    if not family.uncalibrated:
        proof.stream = max(_stream(source))
    for name in _ways(family):
        proof.converted[name] = len(convert(path, folder / name, **_given(name, text)).linears)
        proof.faults += [f"{name}: {fault}" for fault in verify(folder / name, against=path, engine=False).findings]
    proof.seconds = time.monotonic() - started
    return proof


def make(family: Family, folder: Path, text: Path) -> None:
    """A part of :func:`prove`: what :func:`serve` needs."""
    last = _ways(family)[-1]
    convert(family.write(folder / SOURCE), folder / last, **_given(last, text))


def _ways(family: Family) -> list[str]:
    return [name for name in METHODS if not (name == CALIBRATED and family.uncalibrated)]


def _given(name: str, text: Path) -> dict[str, Any]:
    return METHODS[name] | ({"calibration": text} if name == CALIBRATED else {})


def _describe(source: Source, proof: Proof) -> None:
    sites: Counter[str] = Counter()
    for layer in source.layers:
        sites.update({_NUMBER.sub("{}", site.name) for site in layer.sites})
        proof.linears += len(layer.linears)
        for tensor, shape in layer.tensors.items():
            name = tensor.removesuffix(".weight")
            if len(shape) > 1 and name not in layer.linears:
                proof.floats[_NUMBER.sub("{}", name)] = layer.routers.get(name, "")
    proof.sites = dict(sorted(sites.items()))
    headers = source.checkpoint.headers
    beginnings = (re.split(r"\.\d+\.", name)[0] for name in source.outside if len(headers[name].shape) > 1)
    proof.outside = sorted({name.removesuffix(".weight") for name in beginnings})


def _model(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = read_json(folder / CONFIG)
    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    # As transformers chooses, because its eager Falcon adds ALiBi twice; but sdpa drops soft caps without a word.
    attention = "eager" if config.get("attn_logit_softcapping") else None
    options: dict[str, Any] = dict(dtype=dtype, attn_implementation=attention, experts_implementation="eager")
    return auto.from_pretrained(folder, **options).eval()


@torch.no_grad()
def _logits(folder: Path) -> torch.Tensor:
    return _model(folder, torch.float64)(input_ids=_TOKENS, use_cache=False).logits


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def _stream(source: Source) -> Iterator[float]:
    """How far calibration's hidden states behind each block are from those of the whole model."""
    calibration, threads = Calibration(source, _TOKENS, torch.device("cpu")), Threads()
    model, build, seen = _model(Path(source.checkpoint.folder), torch.float32), source.construction, []

    def record(block: torch.nn.Module, given: tuple, returned: Any) -> None:
        seen.append(returned[0] if isinstance(returned, tuple) else returned)

    for block in model.get_submodule(f"{build.decoder}{build.blocks}").children():
        block.register_forward_hook(record)
    model(input_ids=_TOKENS, use_cache=False)
    assert len(seen) == len(source.layers)
    for index, expected in enumerate(seen):
        prefix = source.names.block(index)
        tensors = {name: source.checkpoint.read(prefix + name) for name in source.blocks[index]}
        calibration.advance(index, tensors, threads)
        yield _distance(calibration.hidden, expected)


@dataclass
class Served:
    """What vLLM makes of a conversion, calibrated where that can be, beside the source; both in the same dtype.

    Attributes:
        family: its name.
        error: why there is nothing of this.
        cost: mean KL divergence of the conversion's predictions to the source's, nats a token.
        apart: that of the source's predictions to those in transformers and fp32, which is none of our doing.
        yardstick: that of the source in transformers without its blocks: all that they have to say.
        linears, experts: how many of vLLM's linears, and layers of experts, run on our kernels.
        expected: how many linears should, by what is known of vLLM's fusions.
    """

    family: str
    error: str | None = None
    cost: float = 0.0
    apart: float = 0.0
    yardstick: float = 0.0
    linears: int = 0
    experts: int = 0
    expected: int = 0


def serve(families: Sequence[Family], folder: Path) -> Iterator[Served]:
    """What vLLM makes of families whose ``folder/<name>`` :func:`prove` or :func:`make` has filled."""
    wanted = {
        f"{family.name}-{way}": {"model": folder / family.name / way, "options": {"dtype": family.dtype}}
        for family in families
        for way in (SOURCE, _ways(family)[-1])
    }
    answers: dict[str, dict] = {}
    while left := {name: request for name, request in wanted.items() if name not in answers}:
        found, log = engines.run(folder, WINDOWS, left)
        answers |= found
        if len(found) < len(left):  # the process ended with the first that has no answer
            answers[next(name for name in left if name not in found)] = {"error": log[-3000:]}
    # vLLM looks through whatever modules a process has imported, and can fail of what other engines left.
    for name in [name for name, answer in answers.items() if "error" in answer and len(wanted) > 1]:
        found, _ = engines.run(folder, WINDOWS, {name: wanted[name]})
        answers |= found
    for family in families:
        source, ours = (answers[f"{family.name}-{way}"] for way in (SOURCE, _ways(family)[-1]))
        if error := source.get("error") or ours.get("error"):
            yield Served(family.name, error)
            continue
        path = folder / family.name / SOURCE
        whole, yardstick = _predictions(path)
        before, after = (answer["logprobs"][..., : whole.shape[-1]] for answer in (source, ours))
        if not np.isfinite(before).all():
            yield Served(family.name, "vLLM's predictions of the source itself are not finite")
            continue
        yield Served(
            family.name,
            cost=float(divergence(before, after).mean()),
            apart=float(divergence(whole, before).mean()),
            yardstick=yardstick,
            linears=sum(ours["schemes"].values()),
            experts=sum(ours["experts"].values()),
            expected=family.apart + sum(len(units(layer)) for layer in Source(path).layers),
        )


@torch.no_grad()
def _predictions(folder: Path) -> tuple[np.ndarray, float]:
    """fp32 log-probabilities of a checkpoint, and how far they move without its blocks, which is the yardstick."""
    model, build = _model(folder, torch.float32), Source(folder).construction
    model.config.use_cache = False
    whole = emulate.log_probabilities(model, WINDOWS)
    for block in model.get_submodule(f"{build.decoder}{build.blocks}").children():
        block.forward = Given(build.returned)
    return whole, float(divergence(whole, emulate.log_probabilities(model, WINDOWS)).mean())
