"""What the converter knows of each model type: tensor names and shapes, couplings, fused siblings. Tables, not code."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from vllm_w8a8_bismooth.errors import BismoothError


@dataclass(frozen=True)
class Site:
    """A producer whose output channels are its consumers' input columns, so that magnitude can move between them.

    ``part`` picks the producer's rows where it is several linears stacked (Phi-3's ``qkv_proj``): an index into the
    row sizes of its :attr:`Layer.linears` entry. ``gate`` is the linear whose first rows, through the activation
    function, multiply what the producer makes; ``None`` if nothing does.
    """

    name: str
    producer: str
    consumers: tuple[str, ...]
    part: int = 0
    gate: str | None = None


@dataclass(frozen=True)
class Layer:
    """Names inside one decoder block; sizes are keys of :func:`sizes_of`. ``{}`` stands for every expert's number.

    linears: linear -> (sizes of its stacked rows, columns). All of them become INT8.
    vectors: one-dimensional tensors that the block has -> length.
    sites: couplings. Those whose producer is itself a linear come first, because dividing the producer's rows changes
        the column ranges that the sites behind the norms balance.
    routers: linear -> (rows, columns) of the linears that keep their dtype. They read what a norm wrote, so its factor
        goes into their columns, but they have no say in it.
    fused: what vLLM merges into one linear -> its parts, which must share factor and granularity.
    biases: linear -> the config key that switches its bias on (``None`` if nothing does), and what its absence means.
    row_parallel: linears that tensor parallelism cuts along their columns.
    """

    linears: Mapping[str, tuple[tuple[str, ...], str]]
    vectors: Mapping[str, str]
    sites: tuple[Site, ...]
    routers: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    biases: Mapping[str, tuple[str | None, bool]] = field(default_factory=dict)
    row_parallel: frozenset[str] = frozenset()
    experts: frozenset[str] = frozenset()
    """Linears of experts, which vLLM serves per-channel only. Filled by :meth:`expanded`."""

    def __or__(self, other: "Layer") -> "Layer":
        """Both halves of a block in one; sites behind linears stay before sites behind norms."""
        sites = (*self.sites, *other.sites)
        linears = {**self.linears, **other.linears}
        return Layer(
            linears=linears,
            vectors={**self.vectors, **other.vectors},
            sites=tuple(sorted(sites, key=lambda site: site.producer not in linears)),
            routers={**self.routers, **other.routers},
            fused={**self.fused, **other.fused},
            biases={**self.biases, **other.biases},
            row_parallel=self.row_parallel | other.row_parallel,
        )

    def linear_of(self, tensor: str) -> str | None:
        """The linear whose weight a tensor of the block is, ``None`` for anything else (norms, biases, routers)."""
        linear = tensor.removesuffix(".weight")
        return linear if linear != tensor and linear in self.linears else None

    def expanded(self, experts: int) -> "Layer":
        """The same layer with every ``{}`` replaced by the numbers of ``experts`` experts."""

        def each(names: Iterable[str]) -> Iterator[str]:
            for name in names:
                yield from (name.format(e) for e in range(experts)) if "{}" in name else (name,)

        sites: list[Site] = []
        for site in self.sites:
            private = "{}" in site.producer
            for e in range(experts if private else 1):
                consumers = [c.format(e) for c in site.consumers] if private else each(site.consumers)
                name = f"{site.name}.{e}" if private else site.name
                producer, gate = site.producer.format(e), site.gate and site.gate.format(e)
                sites.append(replace(site, name=name, producer=producer, consumers=tuple(consumers), gate=gate))
        return replace(
            self,
            linears={n: shape for template, shape in self.linears.items() for n in each([template])},
            sites=tuple(sites),
            row_parallel=frozenset(each(self.row_parallel)),
            experts=frozenset(each(n for n in self.linears if "{}" in n)),
        )


@dataclass(frozen=True)
class Architecture:
    """One model type.

    dense: the block with an ordinary MLP; ``None`` where the type has none.
    sparse: the block with experts; ``None`` for dense types.
    sizes: further sizes -> their config key, of which transformers and publishers may use several.
    silent: config key -> what its absence means, where that is not derived from the other sizes.
    offset: what the model adds to a norm's stored gain.
    tied: whether the head is the embedding when the config is silent.
    renamed: beginning of a name in transformers' modules -> in the checkpoint.
    expert_linears: what the checkpoint calls an expert's gate, up and down projection.
    """

    dense: Layer | None
    sparse: Layer | None = None
    sizes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    silent: Mapping[str, int] = field(default_factory=dict)
    offset: float = 0.0
    tied: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    expert_linears: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    def stored(self, name: str) -> str:
        """What the checkpoint calls a tensor or module of a block that transformers builds under ``name``."""
        for built, stored in self.renamed.items():
            name = name.replace(built, stored, 1) if name.startswith(built) else name
        return name

    def built(self, name: str) -> str:
        """The inverse of :meth:`stored`."""
        for built, stored in self.renamed.items():
            name = name.replace(stored, built, 1) if name.startswith(stored) else name
        return name


def _attention(norm: str = "input_layernorm", **more) -> Layer:
    q, k, v, o = (f"self_attn.{letter}_proj" for letter in "qkvo")
    return Layer(
        linears={
            q: (("query",), "hidden"),
            k: (("key",), "hidden"),
            v: (("key",), "hidden"),
            o: (("hidden",), "query"),
        },
        vectors={norm: "hidden", **more.pop("vectors", {})},
        sites=(Site("v->o", v, (o,)), Site("norm->qkv", norm, (q, k, v))),
        fused={"self_attn.qkv_proj": (q, k, v)},
        row_parallel=frozenset({o}),
        **more,
    )


def _mlp(
    norm: str,
    prefix: str = "mlp.",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    size: str = "intermediate",
    inner: str = "up->down",
    **more,
) -> Layer:
    gate, up, down = (prefix + name for name in names)
    return Layer(
        linears={gate: ((size,), "hidden"), up: ((size,), "hidden"), down: (("hidden",), size)},
        vectors={norm: "hidden"},
        sites=(Site(inner, up, (down,), gate=gate), Site("norm->gate_up", norm, (gate, up))),
        fused={} if "{}" in prefix else {f"{prefix}gate_up_proj": (gate, up)},
        row_parallel=frozenset({down}),
        **more,
    )


def _experts(norm: str, routers: Mapping[str, tuple[str, str]], mlps: Layer) -> Layer:
    """MLPs that read one norm beside routers: a single site behind the norm feeds them all."""
    behind = [site for site in mlps.sites if site.producer == norm]
    consumers = tuple(consumer for site in behind for consumer in site.consumers)
    inner = [site for site in mlps.sites if site.producer != norm]
    return replace(mlps, sites=(*inner, Site("norm->experts", norm, (*consumers, *routers))), routers=routers)


_POST = "post_attention_layernorm"
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION_BIAS = dict.fromkeys((*_QKV, "self_attn.o_proj"), ("attention_bias", False))
_QK_NORM = {"self_attn.q_norm": "head", "self_attn.k_norm": "head"}
_MLP_BIAS = dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), ("mlp_bias", False))

_MLP = _mlp(_POST)
_LLAMA = _attention(biases=_ATTENTION_BIAS) | _mlp(_POST, biases=_MLP_BIAS)
_QWEN2, _QWEN3 = (
    _attention(biases=dict.fromkeys(_QKV, (None, True))),
    _attention(vectors=_QK_NORM, biases=_ATTENTION_BIAS),
)
_QWEN2_MOE = _attention(biases=dict.fromkeys(_QKV, ("qkv_bias", True)))
_GEMMA2 = _attention(biases=_ATTENTION_BIAS, vectors={_POST: "hidden", "post_feedforward_layernorm": "hidden"}) | _mlp(
    "pre_feedforward_layernorm"
)
_GEMMA_SILENT = {"head_dim": 256, "num_key_value_heads": 4}
_EXPERT_SIZES = {"experts": ("num_experts", "num_local_experts"), "expert": ("moe_intermediate_size",)}
_ROUTER = {"mlp.gate": ("experts", "hidden")}
_EXPERTS = _mlp(_POST, "mlp.experts.{}.", size="expert")
_PHI3 = Layer(
    linears={
        "self_attn.qkv_proj": (("query", "key", "key"), "hidden"),
        "self_attn.o_proj": (("hidden",), "query"),
        "mlp.gate_up_proj": (("intermediate", "intermediate"), "hidden"),
        "mlp.down_proj": (("hidden",), "intermediate"),
    },
    vectors={"input_layernorm": "hidden", _POST: "hidden"},
    sites=(
        Site("v->o", "self_attn.qkv_proj", ("self_attn.o_proj",), part=2),
        Site("up->down", "mlp.gate_up_proj", ("mlp.down_proj",), part=1, gate="mlp.gate_up_proj"),
        Site("norm->qkv", "input_layernorm", ("self_attn.qkv_proj",)),
        Site("norm->gate_up", _POST, ("mlp.gate_up_proj",)),
    ),
    row_parallel=frozenset({"self_attn.o_proj", "mlp.down_proj"}),
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "gemma2": Architecture(_GEMMA2, silent=_GEMMA_SILENT, offset=1.0, tied=True),
    "gemma3_text": Architecture(
        replace(_GEMMA2, vectors={**_GEMMA2.vectors, **_QK_NORM}), silent=_GEMMA_SILENT, offset=1.0, tied=True
    ),
    "granite": Architecture(_LLAMA),
    "llama": Architecture(_LLAMA),
    "mistral": Architecture(_attention() | _MLP, silent={"num_key_value_heads": 8}),
    "mixtral": Architecture(
        None,
        _attention()
        | _experts(
            _POST,
            {"block_sparse_moe.gate": ("experts", "hidden")},
            _mlp(_POST, "block_sparse_moe.experts.{}.", ("w1", "w3", "w2")),
        ),
        sizes={"experts": ("num_local_experts", "num_experts")},
        silent={"num_key_value_heads": 8},
        renamed={"mlp.": "block_sparse_moe."},
        expert_linears=("w1", "w3", "w2"),
    ),
    "phi3": Architecture(_PHI3),
    "qwen2": Architecture(_QWEN2 | _MLP, silent={"num_key_value_heads": 32}),
    "qwen2_moe": Architecture(
        _QWEN2_MOE | _MLP,
        _QWEN2_MOE
        | _experts(
            _POST,
            {**_ROUTER, "mlp.shared_expert_gate": ("one", "hidden")},
            _EXPERTS | _mlp(_POST, "mlp.shared_expert.", size="shared", inner="shared up->down"),
        ),
        sizes={
            **_EXPERT_SIZES,
            "shared": ("shared_expert_intermediate_size",),
        },
        silent={"num_key_value_heads": 16},
    ),
    "qwen3": Architecture(_QWEN3 | _MLP, silent={"head_dim": 128, "num_key_value_heads": 32}),
    "qwen3_moe": Architecture(
        _QWEN3 | _MLP,
        _QWEN3 | _experts(_POST, _ROUTER, _EXPERTS),
        sizes=_EXPERT_SIZES,
        silent={"num_key_value_heads": 4},
    ),
}

BLOCK = "model.layers.{}."
_INSIDE = re.compile(r"model\.layers\.(\d+)\.(.+)")
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def inside(name: str) -> tuple[int, str]:
    """The block of a full name, and the name inside it."""
    block, rest = _INSIDE.fullmatch(name).groups()
    return int(block), rest


def kind_of(linear: str) -> tuple[str, int]:
    """What a linear is in every block (``q_proj``; all experts as one: ``experts.*.up_proj``), and its block."""
    block, name = inside(linear)
    for part in ("self_attn.", "mlp.", "block_sparse_moe."):
        name = name.removeprefix(part)
    return re.sub(r"\.\d+\.", ".*.", name), block


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


def sizes_of(config: Mapping, architecture: Architecture) -> dict[str, int]:
    """Sizes named in :class:`Layer`, plus ``blocks`` and ``vocab``.

    Raises:
        BismoothError: sizes that are missing, not positive integers, or told twice differently, all of them; or heads
            that do not divide.
    """
    problems = []

    def size(key: str, derived: int | None = None) -> int:
        value = config.get(key)
        value = architecture.silent.get(key, derived) if value is None else value
        if type(value) is int and 0 < value < 2**48:  # products of two can still be printed
            return value
        problems.append(f"config.json: {key} = {config.get(key)!r}; it must be a positive integer below 2**48")
        return 1

    def alias(keys: Sequence[str]) -> int:
        found = [key for key in keys if key in config] or keys[:1]
        values = {key: size(key) for key in found}
        if len(set(values.values())) > 1:
            problems.append(f"config.json: {values} contradict each other; remove one of the keys")
        return values[found[0]]

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        problems.append(
            f"config.json: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}; mend it"
        )
    head = size("head_dim", 1 if problems else hidden // heads)
    sizes = {
        "blocks": size("num_hidden_layers"),
        "hidden": hidden,
        "intermediate": size("intermediate_size"),
        "head": head,
        "heads": heads,
        "kv_heads": kv_heads,
        "query": heads * head,
        "key": kv_heads * head,
        "vocab": size("vocab_size"),
        "one": 1,
        **{name: alias(keys) for name, keys in architecture.sizes.items()},
    }
    if problems:
        raise BismoothError(*problems)
    return sizes


def layers_of(config: Mapping, architecture: Architecture, sizes: Mapping[str, int], blocks: int) -> list[Layer]:
    """What each of the first ``blocks`` decoder blocks holds, experts expanded.

    Which blocks of a mixture are dense follows ``mlp_only_layers`` and ``decoder_sparse_step``, as in transformers'
    Qwen2-MoE.

    Raises:
        BismoothError: one of those keys is not what it must be.
    """
    if architecture.sparse is None:
        return [architecture.dense] * blocks
    sparse = architecture.sparse.expanded(sizes["experts"])
    if architecture.dense is None:
        return [sparse] * blocks
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    if not isinstance(dense, list) or type(step) is not int or step < 1:
        raise BismoothError(
            f"config.json: mlp_only_layers = {dense!r}, decoder_sparse_step = {step!r}; "
            "they must be a list of block numbers and a positive integer"
        )
    return [sparse if i not in dense and (i + 1) % step == 0 else architecture.dense for i in range(blocks)]


def layer_tensors(layer: Layer, sizes: Mapping[str, int], config: Mapping) -> dict[str, tuple[int, ...]]:
    """Name inside a block -> shape, for every tensor that such a block must have."""
    shapes: dict[str, tuple[int, ...]] = {f"{n}.weight": (sizes[size],) for n, size in layer.vectors.items()}
    for name, (rows, columns) in layer.routers.items():
        shapes[f"{name}.weight"] = (sizes[rows], sizes[columns])
    for name, (rows, columns) in layer.linears.items():
        length = sum(sizes[part] for part in rows)
        shapes[f"{name}.weight"] = (length, sizes[columns])
        key, silent = layer.biases.get(name, (None, False))
        if config.get(key, silent):
            shapes[f"{name}.bias"] = (length,)
    return shapes


def audit(
    config: Mapping,
    architecture: Architecture,
    sizes: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    lost: Set[str] = frozenset(),
) -> Iterator[str]:
    """Compare what the config promises with the shapes in the headers; yields one problem at a time, with its remedy.

    Tensors that are ``lost`` are known to be missing: they count as part of the checkpoint and are no further problem.

    Optional are ``lm_head.weight`` of tied models and old checkpoints' rotary tables, which are passed through;
    anything else inside a block is a problem, because converting it as if it were not there would be silently wrong.
    """
    required = {EMBEDDING: (sizes["vocab"], sizes["hidden"]), NORM: (sizes["hidden"],)}
    optional = {HEAD: (sizes["vocab"], sizes["hidden"])}
    if not config.get("tie_word_embeddings", architecture.tied):
        required |= optional
    # Bounded by the headers, not by the config's word for the number of blocks and experts.
    bound = len(shapes) + len(lost)
    if sizes.get("experts", 0) <= bound:
        inside: dict[int, dict[str, tuple[int, ...]]] = {}
        for i, layer in enumerate(layers_of(config, architecture, sizes, min(sizes["blocks"], bound))):
            if id(layer) not in inside:
                inside[id(layer)] = layer_tensors(layer, sizes, config)
            required |= {BLOCK.format(i) + name: shape for name, shape in inside[id(layer)].items()}
            optional[BLOCK.format(i) + "self_attn.rotary_emb.inv_freq"] = (sizes["head"] // 2,)
            if len(required) > 2 * bound:
                break

    for name, shape in required.items():
        if name not in shapes and name not in lost:
            yield f"tensor {name} {list(shape)} is missing; download the checkpoint again or mend config.json"
    if len(required) > 2 * bound or sizes.get("experts", 0) > bound:
        yield f"config.json implies many more tensors than the {bound} in the files; mend it or download the rest"
        return
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
