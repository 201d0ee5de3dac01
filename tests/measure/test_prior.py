"""The model of activations that knows the weights alone."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.testbed.plant import plant
from tests.support.command import run
from tests.support.damage import edit_shard
from tests.support.models import MODEL_TYPES
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.measure import prior
from vllm_w8a8_bismooth.measure.calibration import Calibration
from vllm_w8a8_bismooth.measure.prior import Prior
from vllm_w8a8_bismooth.method.balance import by_error
from vllm_w8a8_bismooth.method.moments import ORDER, Moments
from vllm_w8a8_bismooth.method.rows import ALONE, Threads
from vllm_w8a8_bismooth.method.smooth import Smoothing, smooth_block
from vllm_w8a8_bismooth.model.names import Names

CPU = torch.device("cpu")


def block_of(source: Source, index: int) -> dict[str, torch.Tensor]:
    return {name: source.checkpoint.read(Names().block(index) + name) for name in source.blocks[index]}


def of_all_blocks(source: Source, threads: Threads = ALONE) -> list[dict[str, Moments]]:
    told = Prior(source, CPU)
    return [told.advance(i, block_of(source, i), threads) for i in range(len(source.layers))]


def smoothed(source: Source) -> list[Smoothing]:
    found = of_all_blocks(source)
    return [smooth_block(block_of(source, i), read, source.layers[i], by_error) for i, read in enumerate(found)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_type_is_told_of(make_checkpoint, model_type, dtype):
    source = Source(make_checkpoint(model_type, dtype))
    for layer, found in zip(source.layers, of_all_blocks(source), strict=True):
        expected = {site.name for site in layer.sites if site.producer not in layer.linears or site.gate is not None}
        assert found.keys() == expected and len(expected) < len(layer.sites), "all but what v_proj makes"
        for site in layer.sites:
            if site.name in found:
                linear = next(consumer for consumer in site.consumers if consumer in layer.linears)
                channels = layer.linears[linear][1]
                read = found[site.name]
                for values in (read.largest, read.square, read.high):
                    assert values.shape == (channels,) and values.isfinite().all() and (values >= 0).all()
                assert (read.high >= read.square**4 * (1 - 1e-5)).all(), "E|x|^8 is at least (E x^2)^4"


@pytest.mark.parametrize("model_type", ["llama", "phi3", "qwen2_moe"])
def test_threads_do_not_show(make_checkpoint, model_type, monkeypatch):
    source = Source(make_checkpoint(model_type))
    expected = of_all_blocks(source)
    monkeypatch.setattr("vllm_w8a8_bismooth.method.rows._PIECE", 1000)
    monkeypatch.setattr("vllm_w8a8_bismooth.method.rows._SLAB", 2000)
    with Threads() as threads:
        again = of_all_blocks(source, threads)
    for before, now in zip(expected, again, strict=True):
        for site, moments in before.items():
            tensors = moments.tensors()
            assert all(torch.equal(tensor, now[site].tensors()[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("k", [1024.0, 1000.0])
def test_a_planted_channel_of_the_stream_goes_into_the_factors(make_checkpoint, tmp_path, k):
    """No gain tells of it: embedding and writers are small there, readers large.

    Behind the first norm, where the stream is the embedding, the factors differ by the plant and nothing else. Behind
    it the norm makes every channel a little larger (its RMS lacks one of 64), so that more is added to the stream,
    to all channels alike; what is left are gates that open by as little more.
    """
    healthy = Source(make_checkpoint(dtype=torch.float32))
    plant(healthy.checkpoint.folder, tmp_path / "planted", kind="residual", k=k, channels=1, seed=3)
    planted = Source(tmp_path / "planted")
    told = [Prior(source, CPU) for source in (healthy, planted)]
    ratio = told[0].hidden / told[1].hidden
    at = int(ratio.argmax())
    expected = torch.where(torch.arange(64) == at, 1 / k, 1.0)
    torch.testing.assert_close(ratio, expected**-2, rtol=1e-5, atol=0)
    for block in range(3):
        for stream, source in zip(told, (healthy, planted), strict=True):
            stream.advance(block, block_of(source, block), ALONE)
        torch.testing.assert_close(told[0].hidden / told[1].hidden, expected**-2, rtol=0.03, atol=0)
    for block, (before, after) in enumerate(zip(smoothed(healthy), smoothed(planted), strict=True)):
        for linear in ("self_attn.q_proj", "mlp.up_proj"):
            change = (after.fold(linear).columns / before.fold(linear).columns / expected).log()
            exact = block == 0 and linear == "self_attn.q_proj"
            assert (change - change.mean()).abs().max() < (1e-5 if exact else 1e-3)
        change = (after.fold("mlp.down_proj").columns / before.fold("mlp.down_proj").columns).log()
        assert change.abs().max() < 1e-3, "what is planted in the stream is not seen inside the MLP"


def test_without_correlations_it_is_what_a_model_does(make_checkpoint, tmp_path):
    """A wide model of random weights is as the estimate takes every model to be."""
    changes = dict(hidden_size=256, intermediate_size=384, vocab_size=512, num_hidden_layers=2)
    source = Source(make_checkpoint(dtype=torch.float32, **changes))
    tokens = torch.randint(0, 512, (8, 128), generator=torch.Generator().manual_seed(1))
    measured = Calibration(source, tokens, CPU)
    for i, told in enumerate(of_all_blocks(source)):
        seen = measured.advance(i, block_of(source, i), ALONE)
        for site in ("norm->qkv", "norm->gate_up"):
            error = (told[site].rms() / seen[site].rms()).log()
            assert error.abs().max() < 0.5 and error.std() < 0.15, (i, site)
        spread = (told["up->down"].rms() / seen["up->down"].rms()).log()
        assert (spread - spread.mean()).std() < 0.3


@settings(max_examples=15)
@given(st.floats(-3, 3), st.floats(-3, 3))
def test_gated_products_of_normal_values(gate, size):
    """Against as many drawn values as make chance small."""
    gate, size = 10.0**gate, 10.0**size
    generator = torch.Generator().manual_seed(0)
    g, u = torch.randn(2, 10**6, generator=generator, dtype=torch.float64)
    drawn = (torch.nn.functional.silu(g * gate) * u * size).square().mean().sqrt()
    told = prior._gated(torch.tensor([size]), torch.tensor([gate]), 2)
    assert float(told) == pytest.approx(float(drawn), rel=0.02)
    assert float(prior._gated(torch.tensor([size]), torch.tensor([gate]), ORDER)) > float(told)


def test_moments_of_normal_values():
    assert prior._normal(2) == pytest.approx(1, rel=1e-4) and prior._normal(ORDER) == pytest.approx(105, rel=1e-2)
    silent = prior._gated(torch.zeros(2), torch.zeros(2), ORDER)
    assert silent.tolist() == [0, 0]


def test_dead_weights_are_no_harm(make_checkpoint):
    """A model of zeros, and an embedding channel that no token uses."""
    source = make_checkpoint(num_hidden_layers=1)
    names = [name for name in Source(source).checkpoint.headers if name.endswith("_proj.weight")]
    for name in names:
        edit_shard(source, lambda tensors, name=name: tensors[name].zero_(), name)
    edit_shard(source, lambda tensors: tensors[Names().embedding][:, 9].zero_(), Names().embedding)
    for smoothing in smoothed(Source(source)):
        assert all(fold.columns is None or (fold.columns > 0).all() for fold in smoothing.folds.values())
    edit_shard(source, lambda tensors: tensors[Names().embedding].zero_(), Names().embedding)
    for smoothing in smoothed(Source(source)):
        assert all(fold.columns is None or fold.columns.isfinite().all() for fold in smoothing.folds.values())


@pytest.mark.parametrize("name", ["embed_tokens", "layers.0.input_layernorm", "layers.1.post_attention_layernorm"])
def test_sizes_beyond_fp32_are_refused(make_checkpoint, tmp_path, name):
    """Neither weights nor norms are too large themselves, but what they make is."""
    source = make_checkpoint(num_hidden_layers=2)
    tensor = f"model.{name}.weight"
    edit_shard(source, lambda tensors: tensors[tensor].fill_(3e38), tensor)
    code, message = run("convert", source, tmp_path / "out", "--calibration", "none")
    assert code == 2 and re.search(r"model.layers.\d.\*: what the weights .* overflows at .* repair", message), message
    assert not (tmp_path / "out").exists()


def test_of_a_large_embedding_some_runs_are_read(make_checkpoint, monkeypatch):
    source = Source(make_checkpoint(dtype=torch.float32, vocab_size=1000, sharded=False))
    monkeypatch.setattr(prior, "_ROWS", 100)
    monkeypatch.setattr(prior, "_RUN", 10)
    asked, rows = [], type(source.checkpoint).rows

    def counted(self, name, start, count):
        asked.append((start, count))
        return rows(self, name, start, count)

    monkeypatch.setattr(type(source.checkpoint), "rows", counted)
    found = Prior(source, CPU).hidden
    assert asked == [(start, 10) for start in range(0, 1000, 100)]
    table = source.checkpoint.read(Names().embedding).view(10, 100, -1)[:, :10].square().mean(dim=(0, 1))
    torch.testing.assert_close(found, table)
