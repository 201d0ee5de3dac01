"""What eleven model types hold, written by hand: tensor names and shapes, couplings, fused siblings.

Discovery has to find the same.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from vllm_w8a8_bismooth.checkpoint.blueprint import Blueprint
from vllm_w8a8_bismooth.model.construction import Construction, Experts, Renamed
from vllm_w8a8_bismooth.model.floats import ROUTER
from vllm_w8a8_bismooth.model.layers import Layer, Runs, Site
from vllm_w8a8_bismooth.model.names import Names


@dataclass(frozen=True)
class Coupling:
    """A :class:`layers.Site` as the table has it.

    ``part`` picks the producer's rows where it is several linears stacked (Phi-3's ``qkv_proj``): an index into the
    row sizes of its :attr:`Template.linears` entry.
    """

    name: str
    producer: str
    consumers: tuple[str, ...]
    part: int = 0
    gate: str | None = None


@dataclass(frozen=True)
class Template:
    """A :class:`layers.Layer` with sizes by name, see blueprint.py. ``{}`` stands for each expert's number.

    linears: linear -> (sizes of its stacked rows, columns).
    vectors: one-dimensional tensors that the block has -> length.
    sites: couplings.
    routers: linear -> (rows, columns).
    fused: as of the layer.
    biases: linear -> the config key that switches its bias on (``None`` if nothing does), and what its absence means.
    row_parallel: as of the layer.
    """

    linears: Mapping[str, tuple[tuple[str, ...], str]]
    vectors: Mapping[str, str]
    sites: tuple[Coupling, ...]
    routers: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    biases: Mapping[str, tuple[str | None, bool]] = field(default_factory=dict)
    row_parallel: frozenset[str] = frozenset()

    def __or__(self, other: "Template") -> "Template":
        """Both halves of a block in one; sites behind linears stay before sites behind norms."""
        sites = (*self.sites, *other.sites)
        linears = {**self.linears, **other.linears}
        return Template(
            linears=linears,
            vectors={**self.vectors, **other.vectors},
            sites=tuple(sorted(sites, key=lambda site: site.producer not in linears)),
            routers={**self.routers, **other.routers},
            fused={**self.fused, **other.fused},
            biases={**self.biases, **other.biases},
            row_parallel=self.row_parallel | other.row_parallel,
        )

    def sized(self, sizes: Mapping[str, int], config: Mapping, offset: float) -> Layer:
        """The layer at a model's sizes.

        Args:
            sizes: of the model, by name; with ``experts`` if there are any.
            config: says which biases there are.
            offset: what the model adds to the stored gains of its norms.
        """
        experts = sizes.get("experts", 1)

        def each(names: Iterable[str]) -> Iterator[str]:
            for name in names:
                yield from (name.format(e) for e in range(experts)) if "{}" in name else (name,)

        tensors: dict[str, tuple[int, ...]] = {f"{n}.weight": (sizes[size],) for n, size in self.vectors.items()}
        tensors |= {f"{name}.weight": (sizes[row], sizes[column]) for name, (row, column) in self.routers.items()}
        linears = {}
        for template, (rows, columns) in self.linears.items():
            shape = (sum(sizes[part] for part in rows), sizes[columns])
            key, silent = self.biases.get(template, (None, False))
            for name in each([template]):
                linears[name] = shape
                tensors[f"{name}.weight"] = shape
                if config.get(key, silent):
                    tensors[f"{name}.bias"] = shape[:1]
        divided = {site.producer for site in self.sites}
        posts = {name: offset for name, size in self.vectors.items() if size == "hidden" and name not in divided}
        ends = each(name for name, (rows, _) in self.linears.items() if rows == ("hidden",))
        return Layer(
            tensors=tensors,
            linears=linears,
            sites=tuple(self._sites(sizes, each, offset)),
            routers=dict.fromkeys(self.routers, ROUTER),
            posts=posts,
            writers=frozenset({*ends, *posts}),
            fused=self.fused,
            row_parallel=frozenset(each(self.row_parallel)),
            experts=frozenset(each(n for n in self.linears if "{}" in n)),
        )

    def _sites(self, sizes: Mapping[str, int], each: Callable, offset: float) -> Iterator[Site]:
        for coupling in self.sites:
            producer, private = coupling.producer, "{}" in coupling.producer
            is_norm = producer in self.vectors
            rows = (self.vectors[producer],) if is_norm else self.linears[producer][0]
            start, width = sum(sizes[part] for part in rows[: coupling.part]), sizes[rows[coupling.part]]
            site = Site(
                name=coupling.name,
                producer=producer,
                consumers=tuple(coupling.consumers if private else each(coupling.consumers)),
                rows=((start, width),),
                columns=self._columns(coupling, sizes, width),
                gate=coupling.gate,
                offset=offset if is_norm else 0.0,
            )
            if not private:
                yield site
                continue
            for e in range(sizes["experts"]):
                name, consumers = f"{site.name}.{e}", tuple(c.format(e) for c in site.consumers)
                gate = site.gate and site.gate.format(e)
                yield replace(site, name=name, producer=producer.format(e), consumers=consumers, gate=gate)

    def _columns(self, coupling: Coupling, sizes: Mapping[str, int], width: int) -> Runs | None:
        """In grouped-query attention several query heads read one value head, so their columns share its channels."""
        consumer = coupling.consumers[0]
        columns = sizes[self.linears[consumer][1]] if consumer in self.linears else width
        head, repeats = sizes["head"], columns // width
        if repeats == 1:
            return None
        return tuple((first, head) for first in range(0, width, head) for _ in range(repeats))


@dataclass(frozen=True)
class Architecture:
    """One model type.

    dense: the block with an ordinary MLP; ``None`` where the type has none.
    sparse: the block with experts; ``None`` for dense types.
    sizes: further sizes -> their config key, of which transformers and publishers may use several.
    silent: config key -> what its absence means, where that is not derived from the other sizes.
    offset: what the model adds to a norm's stored gain.
    tied: whether the head is the embedding when the config is silent.
    construction: how transformers builds it.
    """

    dense: Template | None
    sparse: Template | None = None
    sizes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    silent: Mapping[str, int] = field(default_factory=dict)
    offset: float = 0.0
    tied: bool = False
    construction: Construction = Renamed()


def _attention(norm: str = "input_layernorm", **more) -> Template:
    q, k, v, o = (f"self_attn.{letter}_proj" for letter in "qkvo")
    return Template(
        linears={
            q: (("query",), "hidden"),
            k: (("key",), "hidden"),
            v: (("key",), "hidden"),
            o: (("hidden",), "query"),
        },
        vectors={norm: "hidden", **more.pop("vectors", {})},
        sites=(Coupling("v->o", v, (o,)), Coupling("norm->qkv", norm, (q, k, v))),
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
) -> Template:
    gate, up, down = (prefix + name for name in names)
    return Template(
        linears={gate: ((size,), "hidden"), up: ((size,), "hidden"), down: (("hidden",), size)},
        vectors={norm: "hidden"},
        sites=(Coupling(inner, up, (down,), gate=gate), Coupling("norm->gate_up", norm, (gate, up))),
        fused={} if "{}" in prefix else {f"{prefix}gate_up_proj": (gate, up)},
        row_parallel=frozenset({down}),
        **more,
    )


def _experts(norm: str, routers: Mapping[str, tuple[str, str]], mlps: Template) -> Template:
    """MLPs that read one norm beside routers: a single site behind the norm feeds them all."""
    behind = [site for site in mlps.sites if site.producer == norm]
    consumers = tuple(consumer for site in behind for consumer in site.consumers)
    inner = [site for site in mlps.sites if site.producer != norm]
    return replace(mlps, sites=(*inner, Coupling("norm->experts", norm, (*consumers, *routers))), routers=routers)


def _mixture(prefix: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Experts:
    gate, up, down = (prefix + name for name in names)
    return Experts("mlp.experts", (gate, up, down))


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
_PHI3 = Template(
    linears={
        "self_attn.qkv_proj": (("query", "key", "key"), "hidden"),
        "self_attn.o_proj": (("hidden",), "query"),
        "mlp.gate_up_proj": (("intermediate", "intermediate"), "hidden"),
        "mlp.down_proj": (("hidden",), "intermediate"),
    },
    vectors={"input_layernorm": "hidden", _POST: "hidden"},
    sites=(
        Coupling("v->o", "self_attn.qkv_proj", ("self_attn.o_proj",), part=2),
        Coupling("up->down", "mlp.gate_up_proj", ("mlp.down_proj",), part=1, gate="mlp.gate_up_proj"),
        Coupling("norm->qkv", "input_layernorm", ("self_attn.qkv_proj",)),
        Coupling("norm->gate_up", _POST, ("mlp.gate_up_proj",)),
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
        construction=Renamed(
            renamed={"mlp.": "block_sparse_moe."}, mixture=_mixture("block_sparse_moe.experts.{}.", ("w1", "w3", "w2"))
        ),
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
        construction=Renamed(mixture=_mixture("mlp.experts.{}.")),
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
        construction=Renamed(mixture=_mixture("mlp.experts.{}.")),
        sizes=_EXPERT_SIZES,
        silent={"num_key_value_heads": 4},
    ),
}


def sizes_of(config: Mapping, architecture: Architecture) -> dict[str, int]:
    """Sizes named in :class:`Layer`, plus ``blocks`` and ``vocab``."""

    def size(*keys: str, derived: int | None = None) -> int:
        value = next((config[key] for key in keys if config.get(key) is not None), None)
        value = architecture.silent.get(keys[0], derived) if value is None else value
        assert value is not None, keys
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = size("num_key_value_heads", derived=heads)
    head = size("head_dim", derived=hidden // heads)
    return {
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
        **{name: size(*keys) for name, keys in architecture.sizes.items()},
    }


def layers_of(config: Mapping, architecture: Architecture, sizes: Mapping[str, int]) -> list[Layer]:
    """What each block holds, experts expanded.

    Which blocks of a mixture are dense follows ``mlp_only_layers`` and ``decoder_sparse_step``, as in transformers'
    Qwen2-MoE.
    """
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    kinds = [
        template.sized(sizes, config, architecture.offset)
        for template in (architecture.dense, architecture.sparse)
        if template is not None
    ]
    return [kinds[-1 if i not in dense and (i + 1) % step == 0 else 0] for i in range(sizes["blocks"])]


def tabled(config: Mapping) -> Blueprint:
    """A model as the table has it."""
    architecture = ARCHITECTURES[config["model_type"]]
    sizes, names = sizes_of(config, architecture), Names()
    table, norm = (sizes["vocab"], sizes["hidden"]), (sizes["hidden"],)
    return Blueprint(
        names=names,
        sizes=sizes,
        construction=architecture.construction,
        tied=config.get("tie_word_embeddings", architecture.tied),
        layers=layers_of(config, architecture, sizes),
        outside={names.embedding: table, str(names.norm): norm},
        optional={names.head: table},
        known_by="table",
    )
