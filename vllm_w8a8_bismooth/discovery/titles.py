"""Short names of sites, for people: ``norm->qkv``, ``v->o``, ``up->down``."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from vllm_w8a8_bismooth.discovery.record import Site

_AROUND = re.compile(r"_proj(_with_mqa)?$|^c_")
_NORM = re.compile(r"norm|(^|_)ln(_|$|\d)", re.IGNORECASE)


def titled(sites: Iterable[Site]) -> tuple[Site, ...]:
    """The sites with names that differ; where short ones are the same, the producer's is longer."""
    given = list(sites)
    short = [_title(site, _short(site.producer)) for site in given]
    counts = Counter(short)
    longer = [
        title if counts[title] == 1 else _title(site, f"{_parent(site.producer)}.{_short(site.producer)}")
        for site, title in zip(given, short, strict=True)
    ]
    again = Counter(longer)
    number: Counter[str] = Counter()
    found = []
    for site, title in zip(given, longer, strict=True):
        number[title] += 1
        found.append(replace(site, name=title if again[title] == 1 else f"{title} {number[title]}"))
    return tuple(found)


def _title(site: Site, producer: str) -> str:
    if any("experts." in name for name in site.consumers) and "experts." not in site.producer:
        return f"{producer}->experts"
    names = list(dict.fromkeys(_short(name) for name in site.consumers))
    return f"{producer}->{''.join(names) if all(len(n) == 1 for n in names) else '_'.join(names)}"


def _parent(name: str) -> str:
    return name.replace(".{}", "").rpartition(".")[0].rpartition(".")[2]


def _short(name: str) -> str:
    leaf = name.rpartition(".")[2]
    if _NORM.search(leaf):
        return "norm"
    return _AROUND.sub("", leaf) or leaf
