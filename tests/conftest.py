"""Small real checkpoints, made by transformers with random weights and written to disk."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file

from benchmarks.testbed import PYTHON
from benchmarks.testbed.plant import plant
from tests.support.conversion import convert
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.recipe import Recipe

# No deadline: machines are shared. On CI the examples are the same every time, elsewhere new ones are searched.
settings.register_profile(
    "project",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("project")

SHARD = "60KB"


_EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, mlp_only_layers=[0], norm_topk_prob=True
)
# What a type needs beyond the common sizes, so that each of its peculiarities takes part.
EXTRA = {
    "gemma2": dict(sliding_window=16, query_pre_attn_scalar=24),
    "gemma3_text": dict(
        sliding_window=16,
        query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "granite": dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.2, logits_scaling=8.0),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "phi3": dict(pad_token_id=1, head_dim=16),
    "qwen2_moe": dict(**_EXPERTS, shared_expert_intermediate_size=64),
    "qwen3_moe": _EXPERTS,
}
MODEL_TYPES = [
    "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
]  # fmt: skip


def tiny_config(model_type: str, **changes):
    """Three blocks with grouped-query attention; widths are multiples of 32 and differ from each other."""
    from transformers import AutoConfig

    settings = {**EXTRA.get(model_type, {}), **changes}
    base = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        vocab_size=160,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    return AutoConfig.for_model(model_type, **{**base, **settings})


def tiny_model(model_type: str, seed: int = 0, **changes) -> torch.nn.Module:
    """Random weights, biases and norm gains, in fp32."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                gain = "norm" in name and not model_type.startswith("gemma")  # whose norms store gain - 1
                parameter.normal_(1.0 if gain else 0.0, 0.3)
            else:
                parameter.normal_(0, 0.08)
    return model.eval()


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:158]
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def write_checkpoint(folder: Path, model: torch.nn.Module, dtype=torch.bfloat16, sharded: bool = True) -> Path:
    """Save model, tokenizer and a few more side files; ``model`` is left in ``dtype``."""
    model.to(dtype).save_pretrained(folder, max_shard_size=SHARD if sharded else "5GB")
    tiny_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n\xc3\xa9")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.bin.txt").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
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


@contextmanager
def patience(seconds: int) -> Iterator[None]:
    """Turns a hang into a failure."""

    def give_up(*_):
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def write_adapter(folder: Path, model: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LoRA adapter of rank 8 on every INT8 linear, as PEFT writes it; linear -> what it adds to the weight."""
    headers = Checkpoint(model, dtypes=("BF16", "F32", "I8")).headers
    generator, tensors, updates = torch.Generator().manual_seed(seed), {}, {}
    for linear in (name.removesuffix(".weight_scale") for name in headers if name.endswith(".weight_scale")):
        rows, columns = headers[f"{linear}.weight"].shape
        down = torch.randn(8, columns, generator=generator) / columns**0.5
        up = torch.randn(rows, 8, generator=generator) * 0.05
        lora = f"base_model.model.{linear}"
        tensors |= {f"{lora}.lora_A.weight": down, f"{lora}.lora_B.weight": up}
        updates[linear] = up @ down
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({linear.rpartition(".")[2] for linear in updates})
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return updates


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """The planted test bed, mixed and bi-smoothed, and the latter, with two linears left in float, also unmarked."""
    folder = tmp_path_factory.mktemp("serving")
    names = {name: folder / name for name in ("planted", "bismooth", "mixed", "unmarked")}
    plant(PYTHON.model, names["planted"])
    text = read_text(Path(PYTHON.model).parent / "calibration.txt")
    bismooth = Recipe.of("bismooth", calibration_tokens=4096, ignore=r"layers\.0\.(self_attn\.q|mlp\.down)_proj")
    convert(names["planted"], names["bismooth"], bismooth, text)
    convert(names["planted"], names["mixed"], Recipe.of("mixed", group_size=32))
    convert(names["planted"], names["unmarked"], bismooth, text)
    edit_json(names["unmarked"] / "config.json", lambda c: c["quantization_config"].pop("bismooth"))
    return names


@pytest.fixture
def on_rank(monkeypatch):
    """``on_rank(rank, size)``: vLLM parameters made from now on believe to be there."""

    def be(rank: int, size: int) -> None:
        for name, value in {"rank": rank, "world_size": size}.items():
            monkeypatch.setattr(f"vllm.model_executor.parameter.get_tensor_model_parallel_{name}", lambda v=value: v)

    return be
