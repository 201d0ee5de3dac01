"""What a config promises, held against the names and shapes in the headers."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from vllm_w8a8_bismooth.checkpoint.architectures import ARCHITECTURES, BLOCK, EMBEDDING, HEAD, NORM, Architecture, Layer
from vllm_w8a8_bismooth.checkpoint.files import CONFIG
from vllm_w8a8_bismooth.errors import BismoothError, Problem


def architecture_of(config: Mapping) -> Architecture:
    """The table row for a Hugging Face ``config.json``.

    Raises:
        BismoothError: unknown ``model_type``, or the checkpoint is already quantized.
    """
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            method = config[key].get("quant_method", "?") if isinstance(config[key], dict) else "?"
            raise BismoothError.of(
                CONFIG,
                f"the checkpoint is already quantized ({key}.quant_method = {method!r})",
                "convert the original bf16, fp16 or fp32 checkpoint instead",
            )
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise BismoothError.of(
            CONFIG, f"model_type = {model_type!r} is not supported", f"known are {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[model_type]


def sizes_of(config: Mapping, architecture: Architecture) -> dict[str, int]:
    """Sizes named in :class:`Layer`, plus ``blocks`` and ``vocab``.

    Raises:
        BismoothError: with every size that is missing, no positive integer, or given twice differently, and heads that
            do not divide.
    """
    problems: list[Problem] = []

    def size(key: str, derived: int | None = None) -> int:
        value = config.get(key)
        value = architecture.silent.get(key, derived) if value is None else value
        if type(value) is int and 0 < value < 2**48:  # products of two can still be printed
            return value
        problems.append(Problem(CONFIG, f"{key} = {config.get(key)!r} is no positive integer below 2**48", "mend it"))
        return 1

    def alias(keys: Sequence[str]) -> int:
        found = [key for key in keys if key in config] or keys[:1]
        values = {key: size(key) for key in found}
        if len(set(values.values())) > 1:
            problems.append(Problem(CONFIG, f"{values} contradict each other", "remove one of the keys"))
        return values[found[0]]

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        what = f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        problems.append(Problem(CONFIG, what, "mend it"))
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
        assert architecture.dense is not None
        return [architecture.dense] * blocks
    sparse = architecture.sparse.expanded(sizes["experts"])
    if architecture.dense is None:
        return [sparse] * blocks
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    if not isinstance(dense, list) or type(step) is not int or step < 1:
        raise BismoothError.of(
            CONFIG,
            f"mlp_only_layers = {dense!r} and decoder_sparse_step = {step!r} must be a list of block numbers and a "
            "positive integer",
            "mend them",
        )
    return [sparse if i not in dense and (i + 1) % step == 0 else architecture.dense for i in range(blocks)]


def layer_tensors(layer: Layer, sizes: Mapping[str, int], config: Mapping) -> dict[str, tuple[int, ...]]:
    """Name inside a block -> shape, for every tensor that such a block must have."""
    shapes: dict[str, tuple[int, ...]] = {f"{n}.weight": (sizes[size],) for n, size in layer.vectors.items()}
    for name, (row, column) in layer.routers.items():
        shapes[f"{name}.weight"] = (sizes[row], sizes[column])
    for name, (rows, columns) in layer.linears.items():
        length = sum(sizes[part] for part in rows)
        shapes[f"{name}.weight"] = (length, sizes[columns])
        key, silent = layer.biases.get(name, (None, False))
        if config.get(key, silent):
            shapes[f"{name}.bias"] = (length,)
    return shapes


@dataclass
class _Promise:
    """The tensors that a config implies, name -> shape, and whether they are too many to be listed."""

    required: dict[str, tuple[int, ...]]
    optional: dict[str, tuple[int, ...]]
    endless: bool = False

    @classmethod
    def of(cls, config: Mapping, architecture: Architecture, sizes: Mapping[str, int], bound: int) -> "_Promise":
        """Listed up to twice ``bound``, the number in the headers: the config's word for its blocks is not trusted."""
        found = cls({EMBEDDING: (sizes["vocab"], sizes["hidden"]), NORM: (sizes["hidden"],)}, {})
        tied = config.get("tie_word_embeddings", architecture.tied)
        (found.optional if tied else found.required)[HEAD] = (sizes["vocab"], sizes["hidden"])
        found.endless = sizes.get("experts", 0) > bound
        if found.endless:
            return found
        inside: dict[int, dict[str, tuple[int, ...]]] = {}
        for i, layer in enumerate(layers_of(config, architecture, sizes, min(sizes["blocks"], bound))):
            if id(layer) not in inside:
                inside[id(layer)] = layer_tensors(layer, sizes, config)
            found.required |= {BLOCK.format(i) + name: shape for name, shape in inside[id(layer)].items()}
            found.optional[BLOCK.format(i) + "self_attn.rotary_emb.inv_freq"] = (sizes["head"] // 2,)
            if len(found.required) > 2 * bound:
                found.endless = True
                break
        return found


def audit(
    config: Mapping,
    architecture: Architecture,
    sizes: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    lost: Set[str] = frozenset(),
) -> Iterator[Problem]:
    """Compare what the config promises with the shapes in the headers; yields one problem at a time.

    Tensors that are ``lost`` are known to be missing: they count as part of the checkpoint and are no further problem.

    Optional are ``lm_head.weight`` of tied models and old checkpoints' rotary tables, which are passed through;
    anything else inside a block is a problem, because converting it as if it were not there would be silently wrong.
    """
    bound = len(shapes) + len(lost)
    promise = _Promise.of(config, architecture, sizes, bound)
    for name, shape in promise.required.items():
        if name not in shapes and name not in lost:
            what = f"tensor of shape {list(shape)} is missing"
            yield Problem(name, what, f"download the checkpoint again or mend {CONFIG}")
    if promise.endless:
        yield Problem(
            CONFIG, f"implies many more tensors than the {bound} in the files", "mend it or download the rest"
        )
        return
    for name, shape in shapes.items():
        expected = promise.required.get(name) or promise.optional.get(name)
        if expected is None:
            if name.startswith(BLOCK.format("")[:-1]):
                what = f"tensor of shape {list(shape)} is not part of a {config['model_type']} model with this {CONFIG}"
                yield Problem(name, what, f"remove it or mend {CONFIG}")
        elif shape != expected:
            what = f"has shape {list(shape)}, {CONFIG} implies {list(expected)}"
            yield Problem(name, what, "mend the one that is wrong")
