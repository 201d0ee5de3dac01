"""Build the bundled calibration text: ``python -m benchmarks.calibration.build SDISTS REPOSITORIES``.

SDISTS is a folder of the source distributions (``pip download --no-deps --no-binary :all: NAME==VERSION -d SDISTS``),
REPOSITORIES one of bare clones that have the commits (``git clone --bare https://github.com/OWNER/NAME OWNER+NAME``).
Versions and hashes are in :mod:`sources`, what was written for the package in own.jsonl. The same sources give the
same bytes.
"""

import argparse
import gzip
import hashlib
import json
import random
import re
import subprocess
import tarfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from benchmarks.calibration.sources import CODE, LANG, OTHER, OWN, PROSE, SOURCES, TAKES, Source, Take

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "vllm_w8a8_bismooth" / "data"
SEED = 20241126
SIZES = {PROSE: (300, 600, 1000, 1600, 2600, 5000), OTHER: (150, 250, 400, 600), CODE: (250, 400, 700, 1500)}
"""Characters of an excerpt, at least; each as likely as the others. Short where there are many languages: of the usual
16,384 tokens, all shall have some."""
LONGEST = 1500
"""Characters of a paragraph; longer ones, of verse and programs, are cut at a line's end."""

_PREFACE = """\
The calibration text in calibration.jsonl.gz was put together from these sources, all of which permit it. Each row names
its own under "source". Excerpts were cut at paragraphs; paragraphs with addresses, keys, tables and notices, and some
markup, were left out. benchmarks/calibration in the repository has the program that did it."""
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f\xad\u200b\u200e\u200f\u2028\u2029\ufeff\ufffd]")
_MARKUP = re.compile(
    r"[ \t]*\{ ?[#.][^}\n]*\}"  # names of headings
    r"|<!--(.|\n)*?-->"
    r"|^.*(\{\*|\{\{#|</?Listing|<a id=|<img |<span class=|// ANCHOR).*\n?",
    re.MULTILINE,
)
_UNFIT = (
    re.compile(r"[\w.+-]+@[\w-]+\.\w+"),  # addresses
    re.compile(r"[A-Za-z0-9+/=]{36,}|[0-9a-f]{24,}"),  # keys, hashes, base64
    re.compile(r"(?i)copyright|permission is hereby|warrant|spdx|licen[sc]e|sponsor|testimonial"),
    re.compile(r"(?m)^\S{300,}$"),
    re.compile(r"```\w*\n```"),  # what stood there was included from elsewhere
    re.compile(r"(?m)(^[|+].*\n?){3}|^=+( +=+)+$"),  # tables
)


def files_of(source: Source, sdists: Path, repositories: Path) -> dict[str, bytes]:
    """Path -> content of all files of a source that some take wants, and of its licence.

    Raises:
        SystemExit: it is not there in that version.
    """
    wanted = [re.compile(take.files) for take in TAKES if take.source == source.name]

    def wants(path: str) -> bool:
        return path == source.terms or any(pattern.fullmatch(path) for pattern in wanted)

    if source.sha256 is not None:
        archive = sdists / f"{source.name}-{source.version}.tar.gz"
        if hashlib.sha256(archive.read_bytes()).hexdigest() != source.sha256:
            raise SystemExit(f"{archive} is not the one that is pinned")
        with tarfile.open(archive) as tar:
            members = [member for member in tar if member.isfile() and wants(member.name)]
            return {member.name: tar.extractfile(member).read() for member in members}
    folder = repositories / source.name.replace("/", "+")
    git = ["git", f"--git-dir={folder / 'repo' if (folder / 'repo').is_dir() else folder}"]
    listed = subprocess.run([*git, "ls-tree", "-r", "--name-only", source.version], check=True, capture_output=True)
    paths = [path for path in listed.stdout.decode().splitlines() if wants(path)]
    shown = (
        subprocess.run([*git, "show", f"{source.version}:{path}"], check=True, capture_output=True) for path in paths
    )
    return {path: done.stdout for path, done in zip(paths, shown, strict=True)}


def cleaned(text: str) -> list[str]:
    """The paragraphs of a file that are fit: no keys, addresses, tables, licences; nothing unseen."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").expandtabs(4))
    text = _MARKUP.sub("", _UNSEEN.sub("", text))
    paragraphs = [re.sub(r"[ \t]+$", "", part, flags=re.M).strip("\n") for part in re.split(r"\n[ \t]*\n", text)]
    paragraphs = [piece for paragraph in paragraphs for piece in cut(paragraph)]
    return [part for part in paragraphs if part.strip() and not any(pattern.search(part) for pattern in _UNFIT)]


def cut(paragraph: str) -> Iterator[str]:
    """A paragraph in pieces of at most :data:`LONGEST` characters, or a line, if that is longer."""
    held = ""
    for line in paragraph.splitlines():
        if held and len(held) + len(line) >= LONGEST:
            yield held
            held = ""
        held += "\n" * bool(held) + line
    yield held


def excerpts(paragraphs: list[str], sizes: tuple[int, ...], chance: random.Random) -> Iterator[str]:
    """Paragraphs in a row, of different lengths together; what is too short for one at the end is left out."""
    held, size = [], chance.choice(sizes)
    for paragraph in paragraphs:
        held.append(paragraph)
        if sum(map(len, held)) >= size:
            yield "\n\n".join(held)
            held, size = [], chance.choice(sizes)


def declaration(text: str) -> list[str]:
    """The longest passage of the Declaration in a file of googlefonts/lang."""
    found = re.findall(r'^  specimen_\d+: "(.*)"$', text, re.M)
    return [max(found, key=len).replace("\\n", "\n").replace('\\"', '"').replace("\\'", "'")] if found else []


def taken(take: Take, files: dict[str, bytes]) -> list[dict]:
    """Rows of one take: excerpts of its files in a random order, until there are enough characters."""
    chance = random.Random(f"{SEED} {take.source} {take.files}")
    found: list[str] = []
    for path in sorted(path for path in files if re.fullmatch(take.files, path)):
        text = files[path].decode("utf-8", "replace")
        if take.source == LANG:
            found += ["\n".join(cleaned(part)) for part in declaration(text)]
            continue
        if take.begin:
            text = text[re.search(take.begin, text).start() :]
        found += excerpts(cleaned(text), SIZES.get(take.kind, SIZES[PROSE]), chance)
    chance.shuffle(found)
    rows, size = [], 0
    for text in found:
        if size + len(text) > 1.05 * take.characters:
            continue
        rows.append({"text": text, "source": take.source, "language": take.language, "kind": take.kind})
        size += len(text)
    return rows


def characters(row: dict) -> int:
    """What a row says, without a template."""
    return len(row["text"]) if "text" in row else sum(len(turn["content"]) for turn in row["messages"])


def mixed(rows: list[dict]) -> list[dict]:
    """In an order of which every stretch is a mixture: of the kinds by their sizes, and in each of its languages."""
    chance, kinds = random.Random(SEED), defaultdict(list)
    for language in sorted({row["language"] for row in rows}):
        for kind in sorted({row["kind"] for row in rows}):
            group = [row for row in rows if (row["kind"], row["language"]) == (kind, language)]
            chance.shuffle(group)
            kinds[kind] += spread(group, chance)
    placed = [
        pair
        for _, pairs in sorted(kinds.items())
        for pair in spread([row for _, row in sorted(pairs, key=lambda pair: pair[0])], chance)
    ]
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]


def spread(rows: list[dict], chance: random.Random) -> list[tuple[float, dict]]:
    """Each row with its place from 0 to 1, as far from the last as that is long."""
    whole, before, placed = sum(map(characters, rows)), 0, []
    for row in rows:
        placed.append(((before + characters(row) * chance.random()) / whole, row))
        before += characters(row)
    return placed


def licences(files: dict[str, dict[str, bytes]], rows: list[dict]) -> str:
    """What goes beside the text: of each source what it is, how much was taken, and on what terms."""
    parts = [_PREFACE]
    for source in SOURCES:
        own = [row for row in rows if row["source"] == source.name]
        size = sum(map(characters, own))
        lines = [source.name, f"  version: {source.version}", f"  licence: {source.license}"]
        lines += [f"  from: {source.address}"] if source.name != OWN else []
        lines += [f"  sha256: {source.sha256}"] if source.sha256 else []
        lines += [f"  taken: {size} characters in {len(own)} rows"]
        lines += [f"  {source.note}"] if source.note else []
        terms = files[source.name][source.terms].decode().strip() if source.terms else None
        parts.append(
            "\n".join(lines) + "\n\n" + (terms or "Apache-2.0 is the licence of this package, too: see its LICENSE.")
        )
    return f"\n\n{'-' * 78}\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdists", type=Path, metavar="SDISTS")
    parser.add_argument("repositories", type=Path, metavar="REPOSITORIES")
    arguments = parser.parse_args()
    files = {
        source.name: files_of(source, arguments.sdists, arguments.repositories)
        for source in SOURCES
        if source.name != OWN
    }
    rows = [row for take in TAKES for row in taken(take, files[take.source])]
    own = [json.loads(line) for line in (HERE / "own.jsonl").read_text().splitlines()]
    rows = mixed(rows + [{**row, "source": OWN} for row in own])
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    DATA.mkdir(exist_ok=True)
    (DATA / "calibration.jsonl.gz").write_bytes(gzip.compress(content, 9, mtime=0))
    (DATA / "LICENSES.txt").write_text(licences(files, rows))
    sizes: Counter[str] = Counter()
    for row in rows:
        sizes[row["kind"]] += characters(row)
    total = sum(sizes.values())
    print(f"{len(rows)} rows, {total} characters, {len(content)} bytes")
    print(", ".join(f"{kind} {size / total:.1%}" for kind, size in sizes.most_common()))


if __name__ == "__main__":
    main()
