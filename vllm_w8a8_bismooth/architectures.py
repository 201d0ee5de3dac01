"""What the converter knows of each model type: tensor names and shapes, couplings, fused siblings. Tables, not code."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from vllm_w8a8_bismooth.errors import BismoothError


@dataclass(frozen=True)
class Site:
    """A producer whose output channels are its consumers' input columns, so that magnitude can move between them."""

    name: str
    producer: str
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """Names inside one decoder block; sizes are keys of :func:`sizes_of`.

    linears: linear -> (rows, columns). All of them become INT8.
    vectors: one-dimensional tensors that every block has -> length.
    biases: linear -> the config key that switches its bias on; ``True`` where the model type always has one.
    sites: couplings. Those whose producer is itself a linear come first, because dividing the producer's rows changes
        the column ranges that the sites behind the norms balance.
    fused: what vLLM merges into one linear -> its parts, which must share factor and granularity.
    """

    linears: Mapping[str, tuple[str, str]]
    vectors: Mapping[str, str]
    sites: tuple[Site, ...]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    biases: Mapping[str, str | bool] = field(default_factory=dict)

    def linear_of(self, tensor: str) -> str | None:
        """The linear whose weight a tensor of the block is, ``None`` for anything else (norms, biases)."""
        linear = tensor.removesuffix(".weight")
        return linear if linear != tensor and linear in self.linears else None


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_LLAMA = Architecture(
    linears={
        "self_attn.q_proj": ("query", "hidden"),
        "self_attn.k_proj": ("key", "hidden"),
        "self_attn.v_proj": ("key", "hidden"),
        "self_attn.o_proj": ("hidden", "query"),
        "mlp.gate_proj": ("intermediate", "hidden"),
        "mlp.up_proj": ("intermediate", "hidden"),
        "mlp.down_proj": ("hidden", "intermediate"),
    },
    vectors={"input_layernorm": "hidden", "post_attention_layernorm": "hidden"},
    sites=(
        Site("v->o", "self_attn.v_proj", ("self_attn.o_proj",)),
        Site("up->down", "mlp.up_proj", ("mlp.down_proj",)),
        Site("norm->qkv", "input_layernorm", _ATTENTION[:3]),
        Site("norm->gate_up", "post_attention_layernorm", _MLP[:2]),
    ),
    fused={"self_attn.qkv_proj": _ATTENTION[:3], "mlp.gate_up_proj": _MLP[:2]},
    biases={**dict.fromkeys(_ATTENTION, "attention_bias"), **dict.fromkeys(_MLP, "mlp_bias")},
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, biases={}),
    "qwen2": replace(_LLAMA, biases=dict.fromkeys(_ATTENTION[:3], True)),
    "qwen3": replace(
        _LLAMA,
        vectors={**_LLAMA.vectors, "self_attn.q_norm": "head", "self_attn.k_norm": "head"},
        biases=dict.fromkeys(_ATTENTION, "attention_bias"),
    ),
}

BLOCK = "model.layers.{}."
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def architecture_of(config: Mapping) -> Architecture:
    """The table row for a Hugging Face ``config.json``.

    Raises:
        BismoothError: unknown ``model_type``, or the checkpoint is already quantized.
    """
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            method = config[key].get("quant_method", "?") if isinstance(config[key], dict) else "?"
            raise BismoothError(
                f"config.json: the checkpoint is already quantized ({key}.quant_method = {method!r}); "
                "convert the original bf16, fp16 or fp32 checkpoint instead"
            )
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise BismoothError(
            f"config.json: model_type = {model_type!r} is not supported; known are {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[model_type]


def sizes_of(config: Mapping) -> dict[str, int]:
    """Sizes named in :class:`Architecture`, plus ``blocks`` and ``vocab``.

    Raises:
        BismoothError: a size is missing, not a positive integer, or the heads do not divide.
    """

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or value <= 0:
            raise BismoothError(f"config.json: {key} = {config.get(key)!r}; it must be a positive integer")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise BismoothError(
            f"config.json: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        )
    head = size("head_dim", hidden // heads)
    return {
        "blocks": size("num_hidden_layers"),
        "hidden": hidden,
        "intermediate": size("intermediate_size"),
        "head": head,
        "query": heads * head,
        "key": kv_heads * head,
        "vocab": size("vocab_size"),
    }


def block_tensors(architecture: Architecture, sizes: Mapping[str, int], config: Mapping) -> dict[str, tuple[int, ...]]:
    """Name inside a block -> shape, for every tensor that each block must have."""
    shapes: dict[str, tuple[int, ...]] = {f"{n}.weight": (sizes[size],) for n, size in architecture.vectors.items()}
    for name, (rows, columns) in architecture.linears.items():
        shapes[f"{name}.weight"] = (sizes[rows], sizes[columns])
        switch = architecture.biases.get(name, False)
        if switch is True or (switch and config.get(switch)):
            shapes[f"{name}.bias"] = (sizes[rows],)
    return shapes


def audit(
    config: Mapping, architecture: Architecture, sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """Compare what the config promises with the shapes in the headers; yields one problem at a time, with its remedy.

    Optional are ``lm_head.weight`` of tied models and old checkpoints' rotary tables, which are passed through;
    anything else inside a block is a problem, because converting it as if it were not there would be silently wrong.
    """
    required = {EMBEDDING: (sizes["vocab"], sizes["hidden"]), NORM: (sizes["hidden"],)}
    optional = {HEAD: (sizes["vocab"], sizes["hidden"])}
    if not config.get("tie_word_embeddings", False):
        required |= optional
    inside = block_tensors(architecture, sizes, config)
    # Bounded by the headers, not by the config's word for the number of blocks.
    blocks = min(sizes["blocks"], len(shapes))
    for i in range(blocks):
        required |= {BLOCK.format(i) + name: shape for name, shape in inside.items()}
        optional[BLOCK.format(i) + "self_attn.rotary_emb.inv_freq"] = (sizes["head"] // 2,)

    for name, shape in required.items():
        if name not in shapes:
            yield f"tensor {name} {list(shape)} is missing; download the checkpoint again or mend config.json"
    for name, shape in shapes.items():
        expected = required.get(name) or optional.get(name)
        if expected is None:
            if name.startswith(BLOCK.format("")[:-1]):
                yield (
                    f"tensor {name} {list(shape)} is not part of a {config['model_type']} model with this config.json; "
                    "remove it or mend config.json"
                )
        elif shape != expected:
            yield f"tensor {name} has shape {list(shape)}, config.json implies {list(expected)}; one of them is wrong"
    if sizes["blocks"] > blocks:
        yield f"config.json: num_hidden_layers = {sizes['blocks']}, but the files hold only {len(shapes)} tensors"
