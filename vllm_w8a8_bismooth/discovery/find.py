"""Finds the smoothing sites of a config's model, without its weights."""

import itertools
import time
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vllm_w8a8_bismooth.discovery import instance, storage, widths
from vllm_w8a8_bismooth.discovery.assembly import Assembly
from vllm_w8a8_bismooth.discovery.block import Tie
from vllm_w8a8_bismooth.discovery.given import check_alike, check_left, promised, ties_given
from vllm_w8a8_bismooth.discovery.origin import Origin, explained, refused
from vllm_w8a8_bismooth.discovery.proof import LENGTHS, SEEDS, Sample, kind_of, outermost, prove
from vllm_w8a8_bismooth.discovery.record import Discovery, Layer, Modules, Names, Proof, Stored
from vllm_w8a8_bismooth.discovery.writers import writers_of
from vllm_w8a8_bismooth.progress import Progress, silent

_MOST, _MOST_OF_FEW = 24_000_000, 96_000_000
"""Parameters of a small model with all blocks, and of one with as few as hold every kind."""
_EXPERTS = 4


def find(
    config: Mapping[str, Any],
    code: Path | None = None,
    progress: Progress = silent,
    given: Discovery | None = None,
) -> Discovery:
    """See :func:`discover.discover`, which keeps what this finds."""
    started, threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(1)  # the products are so small that sharing them out takes twenty times as long
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return _Search(Origin(config, code)).run(progress, started, given)
    finally:
        torch.set_num_threads(threads)


class _Search:
    """One search: the real model without storage, a small one, and a second small one."""

    def __init__(self, origin: Origin):
        self.origin, config = origin, origin.config
        self.config = config
        try:
            self.real = origin.build(config, "meta")
            self.shapes = storage.shapes(self.real)
        except Exception as error:
            raise origin.refusal(f"transformers builds no model of it ({explained(error)})", error) from None
        given = config.to_dict()
        counts = [n for _, key, value in widths.walk(given) if widths.is_experts(key) for n in widths.numbers(value)]
        self.many = max(counts, default=0)
        self.counts = set(widths.counts(given))
        self.few = min([_EXPERTS, *counts])

    def samples(self) -> list[tuple[int, Sample]]:
        """At most two small models with what their widths were divided by, the smaller first.

        Raises:
            BismoothError: none can be built and run.
        """
        found: list[tuple[int, Sample]] = []
        failed: list[str] = []
        for factor in widths.factors(self.config.to_dict()):
            if found and found[0][0] % factor:
                continue
            depths = [(None, _MOST), (self._prefix(), _MOST_OF_FEW)]
            for blocks, most in reversed(depths) if found else depths:
                try:
                    model = instance.small(self.origin, factor, max(1, self.few), blocks, most)
                    found.append((factor, Sample(model)))
                    break
                except Exception as error:
                    reason = f"widths divided by {factor}: {explained(error)}"
                    failed.insert(len(failed) if isinstance(error, instance.TooLarge) else 0, reason)
            if len(found) == 2 or (found and factor == 1):
                return found
        if not found:
            raise refused(f"no small model of its class runs ({failed[0]})")
        return found

    def _prefix(self) -> int:
        """As few first blocks as hold every kind, at least two."""
        kinds = self._kinds
        return max(2, 1 + max((kinds.index(kind) for kind in set(kinds)), default=1))

    @cached_property
    def _kinds(self) -> list[tuple]:
        """What the config and the shapes tell the blocks apart by."""
        outer = outermost(self.real)
        sizes = {n: sum(p.numel() for p in self.real.get_submodule(n).parameters()) for n in outer}
        text = self.config.get_text_config()
        counted = [n for n in outer if len(self.real.get_submodule(n)) == getattr(text, "num_hidden_layers", 0)]
        path = max(counted or outer, key=sizes.__getitem__)
        blocks = list(self.real.get_submodule(path).children())
        lists = [v for _, _, v in widths.walk(text.to_dict()) if isinstance(v, list | str) and len(v) == len(blocks)]
        given = [entries for entries in lists if len(set(map(str, entries))) < len(entries)]  # no list of blocks
        return [
            (
                type(b).__qualname__,
                tuple((n, tuple(p.shape)) for n, p in b.named_parameters()),
                str([g[i] for g in given]),
            )
            for i, b in enumerate(blocks)
        ]

    def run(self, progress: Progress, started: float, given: Discovery | None) -> Discovery:
        samples = self.samples()
        sample = samples[0][1]
        names, modules, regions = self._surroundings(sample)

        def assembly(index: int, ties: Iterable[Tie]) -> Assembly:
            begin = f"{names.blocks}{index}."
            inside = {name[len(begin) :]: shape for name, shape in self.shapes.items() if name.startswith(begin)}
            return Assembly(sample.blocks[index], regions[index], inside, (self.few, self.many), ties, self.counts)

        if given is None:
            found = sample.search(progress)
        else:
            expected = promised(given, sample.blocks, regions)
            found = ties_given(given, [assembly(index, ties) for index, ties in enumerate(expected)], sample)
        proven = prove(sample, found, samples[1][1] if len(samples) > 1 else None)
        if given is not None:
            check_left(sample, proven.failures)
        dropped = {
            f"{block.name.rpartition('.')[2]}: {failure.tie.producer}": failure.why
            for block, some in zip(sample.blocks, proven.failures, strict=True)
            for failure in some
        }
        kinds: dict[tuple[str, int, str], int] = {}
        layers: list[Layer] = []
        experts: list[int] = []
        stored: list[Stored] = []
        chosen: list[int] = []
        writers: dict[tuple, set[str]] = {}
        for index, block in enumerate(sample.blocks):
            made = assembly(index, proven.left[index])
            kind = kind_of(block)
            if kind not in writers:
                writers[kind] = writers_of(block)
            layer, unfit = made.layer(writers[kind])
            dropped |= {f"{index}: {producer}": why for producer, why in unfit.items()}
            where = made.stored()
            key = (repr(layer), made.experts, repr(where))
            if key not in kinds:
                kinds[key] = len(layers)
                layers.append(layer)
                stored.append(where)
                experts.append(made.experts)
            chosen.append(kinds[key])
        real = self._kinds if len(chosen) < self._blocks(names) else []
        chosen += [chosen[real.index(kind)] for kind in real[len(chosen) :]]
        inside_blocks = tuple(f"{names.blocks}{i}." for i in range(len(chosen)))
        result = Discovery(
            model_type=self.config.model_type,
            templates=tuple(layers),
            experts=tuple(experts),
            blocks=tuple(chosen),
            names=names,
            modules=modules,
            stored=tuple(stored),
            outside={n: s for n, s in sorted(self.shapes.items()) if not n.startswith(inside_blocks)},
            proof=Proof(
                factors=tuple(f for f, _ in samples),
                blocks=len(sample.blocks),
                output=proven.output,
                large=proven.large,
                logits=proven.logits,
                resized=proven.resized,
                seeds=SEEDS,
                lengths=LENGTHS,
                dropped=dict(sorted(dropped.items())),
                unseen=tuple(sorted({name for block in sample.blocks for name in block.unseen})),
            ),
            seconds=time.monotonic() - started,
        )
        if given is not None:
            check_alike(given, result)
        return result

    def _blocks(self, names: Names) -> int:
        inside = [n[len(names.blocks) :].split(".")[0] for n in self.shapes if n.startswith(names.blocks)]
        return 1 + max(int(index) for index in inside if index.isdigit())

    def _surroundings(self, sample: Sample) -> tuple[Names, Modules, list[dict[str, list[storage.Region]]]]:
        """Names and modules around the blocks, and where the checkpoint has what is in each block."""
        model: Any = sample.model
        everything = storage.regions(model)
        of = {region.parameter: tensor for tensor, found in everything.items() for region in found}
        inside: list[dict[str, list[storage.Region]]] = []
        prefix = ""
        for block in sample.blocks:
            own = f"{block.name}."
            index = block.name.rpartition(".")[2]
            held = {t: f for t, f in everything.items() if f and all(r.parameter.startswith(own) for r in f)}
            prefix = _prefix_of(list(held), index)
            begin = f"{prefix}{index}."
            inside.append(
                {t[len(begin) :]: [_inner(r, own, begin) for r in f] for t, f in held.items() if t.startswith(begin)}
            )
        embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
        out = model.get_output_embeddings() or _unnamed_head(model, sample.path)
        head = next((n for n, m in model.named_modules() if out is not None and m is out), None)
        norm = _last_norm(sample)
        tied = out is not None and out.weight is model.get_input_embeddings().weight
        names = Names(
            blocks=prefix,
            embedding=of.get(f"{embedding}.weight"),
            norm=of.get(f"{norm}.weight") if norm else None,
            head=None if tied or head is None else of.get(f"{head}.weight"),
            tied=tied,
        )
        base = _base_of(model, sample.path, embedding)
        beside = tuple(f"{path}." for path in (sample.path, embedding, norm, head))
        outside = {
            region.parameter: tensor
            for tensor, found in everything.items()
            for region in found
            if len(found) == 1 and not region.transposed and not region.parameter.startswith(beside)
            if not any(part.isdigit() for part in region.parameter.split("."))  # of the blocks of a tower
        }
        made = sample.blocks[0].returned()
        returned = len(made) if isinstance(made, tuple) else 0
        return names, Modules(base, sample.path, embedding, norm, head, outside, returned), inside


def _base_of(model: Any, blocks: str, embedding: str) -> str:
    """What the paths of the bare decoder's modules begin with in a causal language model."""
    from transformers import AutoModel

    if AutoModel._model_mapping.get(type(model.config), None) is type(model):  # Llama 4 with its tower
        return ""
    if hasattr(model, model.base_model_prefix):
        return f"{model.base_model_prefix}."
    parts = zip(blocks.split("."), embedding.split("."), strict=False)  # Llama 4 names another prefix than it has
    return "".join(f"{part}." for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], parts))


def _unnamed_head(model: Any, blocks: str) -> torch.nn.Module | None:
    """The head of a class that does not say which module it is: the one linear of the embedding's shape."""
    shape = model.get_input_embeddings().weight.shape
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight.shape == shape and not name.startswith(f"{blocks}.")
    ]
    return found[0] if len(found) == 1 else None


def _prefix_of(tensors: list[str], index: str) -> str:
    """What the names of a block's tensors begin with before its number."""
    split = [name.split(".") for name in tensors]
    depth = next(d for d in range(len(split[0])) if all(len(s) > d and s[d] == index for s in split))
    return "".join(f"{part}." for part in split[0][:depth])


def _inner(region: storage.Region, own: str, begin: str) -> storage.Region:
    return storage.Region(
        region.parameter[len(own) :],
        region.expert,
        region.rows,
        region.tensor[len(begin) :],
        region.start,
        region.transposed,
    )


def _last_norm(sample: Sample) -> str | None:
    """The norm outside the blocks that runs last."""
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda m, a, o, n=name: ran.append(n))
        for name, module in sample.model.named_modules()
        if "norm" in type(module).__name__.lower() and not name.startswith(f"{sample.path}.")
    ]
    try:
        sample.logits_change([], 1)
    finally:
        for hook in hooks:
            hook.remove()
    return ran[-1] if ran else None
