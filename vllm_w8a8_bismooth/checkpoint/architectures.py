"""What the converter knows of each model type: tensor names and shapes, couplings, fused siblings. Tables, not code."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from vllm_w8a8_bismooth.checkpoint.names import block_of


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
    """Names inside one decoder block; sizes are keys of :func:`audit.sizes_of`. ``{}`` stands for each expert's number.

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

    @property
    def writers(self) -> set[str]:
        """What adds to the residual stream: the linears that end in it, and the norms behind them (Gemma's).

        No site divides their rows or gains, so that whatever reads the stream reads what it read before.
        """
        divided = {site.producer for site in self.sites}
        return {linear for linear, (rows, _) in self.linears.items() if rows == ("hidden",)} | {
            vector for vector, length in self.vectors.items() if length == "hidden" and vector not in divided
        }

    def linear_of(self, tensor: str) -> str | None:
        """The linear whose weight a tensor of the block is, ``None`` for anything else (norms, biases, routers)."""
        linear = tensor.removesuffix(".weight")
        return linear if linear != tensor and linear in self.linears else None

    def with_siblings(self, names: Iterable[str]) -> set[str]:
        """Names inside the block, and the siblings that vLLM fuses them with: a fused linear has one granularity."""
        chosen = set(names)
        for parts in self.fused.values():
            if chosen & set(parts):
                chosen |= set(parts)
        return chosen

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


def kind_of(linear: str) -> tuple[str, int]:
    """What a linear is in every block (``q_proj``; all experts as one: ``experts.*.up_proj``), and its block."""
    block, name = block_of(linear)
    for part in ("self_attn.", "mlp.", "block_sparse_moe."):
        name = name.removeprefix(part)
    return re.sub(r"\.\d+\.", ".*.", name), block
