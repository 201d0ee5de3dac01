"""What vLLM's users expect of any quantization method, on our checkpoints and in real engines."""

import asyncio
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.server import serve
from benchmarks.testbed import PYTHON
from tests.support.adapters import write_adapter
from tests.support.agreement import assert_close_to_emulation, assert_same_up_to_near_ties
from tests.support.conversion import convert
from tests.support.damage import edit_json
from tests.support.workers import engine
from tests.support.workers.engine import PROMPTS, ask
from vllm_w8a8_bismooth.recipe import Recipe

LONG_PROMPTS = [PYTHON.calibration.read_text()[start : start + 600] for start in range(0, 6000, 1500)]
BUDGET = 64  # tokens a step, fewer than each of these prompts has
BLOCKS = 6
LINEARS = {"32": 6, "None": 19}
"""In the mixed checkpoint: qkv and gate_up of three blocks per-group; o and down, the other blocks and the head
per-channel."""
CLOSE_BEHIND_LONG = 0.2
"""Nats behind 275 tokens: 0.174 was the largest, on a CPU with AMX and one thread, and 0.163 there through vLLM's
transformers backend, whose attention is another."""
CLOSE_ADAPTED = 0.15
"""Nats with an adapter on every linear and the head, which is INT8, too: 0.107 was the largest; without what the
adapter adds to the head it is 0.449."""
FP8 = 0.3
"""Nats between ours and stock's kernels with an fp8 KV cache, which both truncate: 0.16 was the largest, and the cache
itself moves these prompts' first step by 0.13 to 0.74."""
KV_SCALES = (("k", 2.0), ("v", 0.25))


def with_scaled_cache(folder: Path, source: Path) -> Path:
    """The checkpoint with scales for an fp8 KV cache, as llm-compressor writes them; each block has its own."""
    shutil.copytree(source, folder)
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(kv_cache_scheme=scheme))
    scales = {
        f"model.layers.{i}.self_attn.{x}_scale": torch.tensor(s * (i + 1)) for i in range(BLOCKS) for x, s in KV_SCALES
    }
    shard = folder / "model.safetensors"
    save_file(load_file(shard) | scales, shard, metadata={"format": "pt"})
    (folder / "report.json").unlink()  # which notes the shard's hash
    return folder


def small_draft(folder: Path, source: Path) -> Path:
    """The first and the last two of the six blocks, whose next token is the whole model's in two cases of five."""
    shutil.copytree(source, folder / "cut")
    kept = {"0": "0", "4": "1", "5": "2"}
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        head, found, tail = name.partition("model.layers.")
        block, _, rest = tail.partition(".")
        if not found:
            tensors[name] = tensor
        elif block in kept:
            tensors[f"{head}{found}{kept[block]}.{rest}"] = tensor
    save_file(tensors, folder / "cut" / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "cut" / "config.json", lambda c: c.update(num_hidden_layers=len(kept)))
    convert(folder / "cut", folder / "draft", Recipe.of("mixed", group_size=32))
    return folder / "draft"


@pytest.fixture(scope="module")
def engines(checkpoints, tmp_path_factory) -> dict[str, dict]:
    """One engine after the other, in one process; see :mod:`tests.support.workers.features` for what each says."""
    folder = tmp_path_factory.mktemp("features")
    speculation = {"method": "draft_model", "num_speculative_tokens": 3}
    lookup = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    scaled = with_scaled_cache(folder / "scaled", checkpoints["bismooth"])
    options = {
        "plain": {},
        "cached": dict(enable_prefix_caching=True, block_size=32, max_num_batched_tokens=BUDGET, max_num_seqs=4),
        "dummy": dict(load_format="dummy"),
        "transformers": dict(model_impl="transformers"),
        "scaled cache": dict(model=scaled),
        "scaled cache, stock": dict(model=scaled, quantization="compressed-tensors"),
        "e5m2 cache": dict(model=checkpoints["bismooth"], kv_cache_dtype="fp8_e5m2"),
        "e5m2 cache, stock": dict(
            model=checkpoints["bismooth"], kv_cache_dtype="fp8_e5m2", quantization="compressed-tensors"
        ),
        "draft": dict(speculative_config=speculation | {"model": small_draft(folder, checkpoints["planted"])}),
    }
    if importlib.util.find_spec("runai_model_streamer"):
        options["runai_streamer"] = dict(load_format="runai_streamer")
    options["ngram"] = dict(speculative_config=lookup)  # last: vLLM 0.32 starts no engine after it (numba)
    options = {name: {"model": checkpoints["mixed"], "max_model_len": 384} | more for name, more in options.items()}
    request = {"engines": options, "prompts": LONG_PROMPTS, "max_tokens": 24}
    result, log = engine.run(folder, module="tests.support.workers.features", **request)
    assert result is not None, log[-3000:]
    return result


def of(engines: dict[str, dict], name: str, method: str = "w8a8_bismooth") -> dict:
    found = engines[name]
    assert "error" not in found, found["error"]
    assert found["quantization"] == method
    return found


@pytest.mark.engine
def test_long_prompts(checkpoints, engines):
    """What the others are compared with: the emulation's answers, from the linears that the checkpoint names."""
    plain = of(engines, "plain")
    assert plain["linears"] == LINEARS and plain["forwards"][0] > 4 * BUDGET
    first_steps = [steps[0] for steps in plain["first"]["logprobs"]]
    assert_close_to_emulation(checkpoints["mixed"], LONG_PROMPTS, first_steps, close=CLOSE_BEHIND_LONG)


@pytest.mark.engine
def test_prefix_caching_and_chunked_prefill(engines):
    cached, plain = of(engines, "cached"), of(engines, "plain")
    assert max(cached["forwards"]) == BUDGET
    assert cached["first"]["cached"] == [0] * len(LONG_PROMPTS) and min(cached["second"]["cached"]) > BUDGET
    for time in ("first", "second"):
        assert_same_up_to_near_ties(cached[time], plain["first"])


@pytest.mark.engine
def test_kv_cache_scheme_of_the_checkpoint(engines):
    """fp8 without being asked, with the checkpoint's scales; the answers are those of the stock method."""
    ours, stock = of(engines, "scaled cache"), of(engines, "scaled cache, stock", "compressed-tensors")
    assert ours["cache"] == [["fp8", *(s * (i + 1) for _, s in KV_SCALES)] for i in range(BLOCKS)] == stock["cache"]
    assert_same_up_to_near_ties(ours["first"], stock["first"], FP8)


@pytest.mark.engine
def test_kv_cache_dtype(engines):
    """The one that vLLM refuses for checkpoints quantized otherwise than by compressed-tensors."""
    ours, stock = of(engines, "e5m2 cache"), of(engines, "e5m2 cache, stock", "compressed-tensors")
    assert ours["cache"] == [["fp8_e5m2", 1, 1]] * BLOCKS == stock["cache"]
    assert_same_up_to_near_ties(ours["first"], stock["first"], FP8)


@pytest.mark.engine
@pytest.mark.parametrize(("name", "least"), [("draft", 20), ("ngram", 10)])
def test_speculative_decoding(engines, name, least):
    """The draft is a checkpoint of ours, too."""
    speculative = of(engines, name)
    assert speculative["accepted"] >= least
    assert speculative.get("draft") == ({"32": 2, "None": 10} if name == "draft" else None)
    assert_same_up_to_near_ties(speculative["first"], of(engines, "plain")["first"])


@pytest.mark.engine
def test_transformers_backend(engines):
    backend = of(engines, "transformers")
    assert backend["linears"] == LINEARS
    assert_same_up_to_near_ties(backend["first"], of(engines, "plain")["first"])


@pytest.mark.engine
def test_runai_streamer(engines):
    pytest.importorskip("runai_model_streamer")
    assert of(engines, "runai_streamer")["first"] == of(engines, "plain")["first"]


@pytest.mark.engine
def test_dummy_weights_and_then_real_ones(engines):
    """As trainers start. The weights, not the answers: vLLM 0.32 keeps its own packed copy of the head on a CPU."""
    dummy, plain = of(engines, "dummy"), of(engines, "plain")
    assert dummy["linears"] == LINEARS and all(dummy["first"]["tokens"])
    assert dummy["weights"] != plain["weights"] == dummy["reloaded_weights"]


@pytest.mark.engine
def test_sleep_loses_nothing(engines):
    """vLLM puts no CPU to sleep. On a GPU, level 2 keeps buffers only, and then the parameters are read again."""
    for name in engines.keys() - {"dummy", "scaled cache, stock", "e5m2 cache, stock"}:
        found = of(engines, name)
        assert found["loose"] == [] and found["reloaded_weights"] == found["weights"], name
        assert found["reloaded"] == found["first"], name


@pytest.mark.engine
def test_pipeline_of_two(checkpoints, tmp_path, monkeypatch):
    """Compiled, because vLLM 0.32 has no warm-up on eager CPUs, which a pipeline's later stages need."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    compiled = {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"}  # saves Inductor's time
    ours = ask(tmp_path, checkpoints["mixed"], pipeline_parallel_size=2, compilation_config=compiled)
    assert "rank 0 in world size 2" in ours["log"]
    assert_close_to_emulation(checkpoints["mixed"], PROMPTS, ours["first_steps"])


@pytest.mark.engine
def test_adapter_over_http(checkpoints, tmp_path, monkeypatch):
    """Loaded into a running server, answering beside the base model in its batch, and unloaded again.

    With one slot more than adapters: on a CPU, vLLM (pull request 48421) gives requests of the base model the last.
    """
    import httpx
    from openai import AsyncOpenAI, NotFoundError

    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    model = checkpoints["mixed"]
    updates = write_adapter(tmp_path / "adapter", model)
    steps, events = {"base": {}, "adapter": {}}, []

    async def complete(client: AsyncOpenAI, name: str, prompt: str) -> None:
        asked = {"max_tokens": 96, "temperature": 0, "logprobs": 5, "stream": True, "extra_body": {"ignore_eos": True}}
        async for chunk in await client.completions.create(model=name, prompt=prompt, **asked):
            if found := chunk.choices[0].logprobs:
                events.append((name, prompt))
                steps[name].setdefault(prompt, found.top_logprobs[0])

    async def talk(url: str) -> None:
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="unused")
        adapter = {"lora_name": "adapter", "lora_path": str(tmp_path / "adapter")}
        httpx.post(f"{url}/v1/load_lora_adapter", json=adapter).raise_for_status()
        assert {m.id for m in (await client.models.list()).data} == {"base", "adapter"}
        await asyncio.gather(*(complete(client, name, prompt) for prompt in PROMPTS for name in steps))
        httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "adapter"}).raise_for_status()
        with pytest.raises(NotFoundError):
            await complete(client, "adapter", PROMPTS[0])
        await complete(client, "base", PROMPTS[0])

    flags = ["--served-model-name", "base", "--max-model-len", "256", "--enforce-eager"]
    flags += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--return-tokens-as-token-ids"]
    with serve(model, tmp_path / "log", *flags) as url:
        asyncio.run(talk(url))
    streams = [(name, prompt) for name in steps for prompt in PROMPTS]
    latest_start = max(events.index(stream) for stream in streams)
    assert set(streams) <= set(events[latest_start:])  # when the last answer began, none had ended
    for name, changes in (("base", {}), ("adapter", updates)):
        first_steps = [
            {token.removeprefix("token_id:"): logprob for token, logprob in steps[name][prompt].items()}
            for prompt in PROMPTS
        ]
        assert_close_to_emulation(model, PROMPTS, first_steps, changes, CLOSE_ADAPTED)
