"""The calibration text that comes with the package: what it holds, whose it is, and that it is the default."""

import gzip
import hashlib
import json
import lzma
import re
import unicodedata
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer

import vllm_w8a8_bismooth as b
from benchmarks.calibration.sources import OWN, SOURCES
from benchmarks.testbed import BEDS, CORPUS, PYTHON
from tests.support.command import json_of, run
from tests.support.contents import digests
from tests.support.damage import drop
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint
from vllm_w8a8_bismooth.errors import BismoothError, Interrupted
from vllm_w8a8_bismooth.measure import bundled
from vllm_w8a8_bismooth.measure.text import read_text, sample

SHA256 = "956e747b79f37974b67b8fa591c1f0a220c5cf85c457af315bc66be6954ab47b"
"""Another text makes other checkpoints: a release that changes it says so in the changelog."""
LANGUAGES = {"en", "de", "es", "fr", "pt", "ru", "tr", "uk", "ja", "ko", "zh", "zh-Hant", "hi", "ar", "it", "pl", "nl"}
PROGRAMS = {"python", "javascript", "c", "cpp", "rust", "go", "java", "shell", "sql", "json", "html", "css", "yaml"}
PERMISSIVE = {"MIT", "BSD-3-Clause", "Apache-2.0"}
FEW = ("--calibration-tokens", "300")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    with gzip.open(bundled.path(), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def said(row: dict) -> str:
    return row["text"] if "text" in row else "\n".join(turn["content"] for turn in row["messages"])


def spoken(row: dict) -> int:
    """Characters of a row, without what joins turns."""
    return len(row["text"]) if "text" in row else sum(len(turn["content"]) for turn in row["messages"])


def grams(text: str, length: int = 13) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_it_is_the_one_that_was_built():
    text = read_text(bundled.WORD)
    assert text.sha256 == hashlib.sha256(bundled.path().read_bytes()).hexdigest() == SHA256
    (read,) = text.files
    assert text.name == "bundled calibration text" and (read.rows, read.skipped) == (442, 0)
    assert 300_000 < read.characters < 400_000 and bundled.path().stat().st_size < 200_000


@pytest.mark.parametrize("bed", BEDS)
def test_it_has_tokens_enough(bed, rows):
    """Also for tokenizers of large vocabularies: those make a token of five characters at most, on average."""
    tokenizer = Tokenizer.from_file(str(BEDS[bed].model / "tokenizer.json"))
    assert sum(len(found.ids) for found in tokenizer.encode_batch(list(map(said, rows)))) > 65536
    assert sum(len(said(row)) for row in rows) / 5 > 65536


def test_whose_it_is(rows):
    terms = bundled.path().with_name("LICENSES.txt").read_text()
    known = {source.name: source for source in SOURCES}
    assert {row["source"] for row in rows} == known.keys()
    for source in known.values():
        assert source.license in PERMISSIVE
        (entry,) = re.findall(rf"(?:\A|\n){re.escape(source.name)}\n  version: (.*)\n  licence: (.*)\n", terms)
        assert entry == (source.version, source.license)
        own = [row for row in rows if row["source"] == source.name]
        assert f"  taken: {sum(map(spoken, own))} characters in {len(own)} rows\n" in terms
    assert terms.count("Permission is hereby granted") >= sum(source.license == "MIT" for source in known.values())
    assert terms.count("Redistributions of source code must retain") >= sum(s.license[:3] == "BSD" for s in SOURCES)
    assert all(row["source"] == OWN for row in rows if "messages" in row)


def test_it_is_a_mixture(rows):
    """Also of each eighth: a sample is spread over the whole, and few tokens show little of it."""
    shares, languages = Counter(), {row["language"] for row in rows}
    assert languages >= LANGUAGES | PROGRAMS
    for row in rows:
        shares[row["kind"]] += len(said(row))
    whole = sum(shares.values())
    assert {kind: round(20 * size / whole) for kind, size in shares.items()} == {
        **{"prose": 8, "other languages": 5, "code": 5, "maths": 1, "chat": 1}
    }
    sizes = [len(said(row)) for row in rows]
    assert min(sizes) < 100 and max(sizes) > 5000 and sorted(sizes)[len(sizes) // 2] < 1000
    ends = np.cumsum(sizes) * 8 // (whole + 1)
    for part in range(8):
        of_part = Counter()
        for row, end in zip(rows, ends, strict=True):
            of_part[row["kind"]] += len(said(row)) * (end == part)
        for kind in ("prose", "other languages", "code"):
            assert 0.6 < of_part[kind] / sum(of_part.values()) / (shares[kind] / whole) < 1.5, (part, kind)


def test_a_sample_is_of_many_rows():
    used = sample(read_text(bundled.WORD), Checkpoint(PYTHON.model), 16384).used
    assert used.tokens == 16384 and used.documents > 50 and used.left_out == 0
    assert used.plain_chats and used.remarks() == []  # nobody gave these chats for a template


def test_it_is_clean(rows):
    for row in rows:
        text = said(row)
        assert text.strip() and text == unicodedata.normalize("NFC", text)
        assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn") and c != "\n"]
        assert not re.search(r"[\w.+-]+@[\w-]+\.\w+|[A-Za-z0-9+/]{60,}", text), row
        assert row.keys() <= {"text", "messages", "source", "language", "kind"}
        turns = [turn["role"] for turn in row.get("messages", ())]
        assert turns == ["user", "assistant"] * (len(turns) // 2)  # what every template takes


def test_nothing_of_what_models_are_measured_on_is_in_it(rows):
    ours = set().union(*(grams(said(row)) for row in rows))
    with lzma.open(CORPUS, "rt") as file:
        measured = [" ".join(map(str, json.loads(line).values())) for line in file]
    for bed in BEDS.values():
        tokenizer = Tokenizer.from_file(str(bed.model / "tokenizer.json"))
        measured += [tokenizer.decode(np.load(bed.folder / "heldout.npy").tolist()), bed.calibration.read_text()]
    assert len(measured) > 400 and not any(ours & grams(text) for text in measured)


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_it_is_the_default(make_checkpoint, tmp_path, model_type):
    """Of the command and of the function, by its name and without; report and card say it in words."""
    source = make_checkpoint(model_type)
    code, message = run("convert", source, tmp_path / "out", *FEW)
    assert code == 0 and "Calibrated on 256 tokens of bundled calibration text." in message
    assert b.convert(source, tmp_path / "out", calibration="bundled", calibration_tokens=300).reused
    outcome = b.convert(source, tmp_path / "again", calibration_tokens=300)
    assert outcome.recipe.calibration == SHA256 and outcome.used.files == (bundled.NAME,)
    assert digests(tmp_path / "again") == digests(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert report["calibration"]["files"] == [bundled.NAME] and report["calibration"]["tokens"] == 256
    assert recipe["recipe"]["calibration"] == SHA256 and recipe["provenance"]["calibration"] == bundled.NAME
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The text was bismooth's bundled calibration text: 256 tokens in 2 windows" in card and SHA256 in card


@pytest.mark.parametrize("method", ["bismooth", "auto", "rtn", "mixed"])
def test_it_is_the_default_of_methods_that_take_text(make_checkpoint, tmp_path, method):
    options = ("--group-size", "32") if method in ("mixed", "auto") else ()
    code, message = run("convert", make_checkpoint(), tmp_path / "out", "--method", method, *options, "--dry-run")
    assert code == 0 and ("of bundled calibration text" in message.replace("\n", " ")) == (
        method in ("bismooth", "auto")
    )


def test_own_text_beside_it(make_checkpoint, tmp_path, calibration_text):
    plan = b.preview(make_checkpoint(), tmp_path / "out", calibration=["bundled", calibration_text])
    assert plan.used.files == (bundled.NAME, calibration_text.name) and plan.used.rows == 443


def test_a_file_of_its_name(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundled").write_text("a text of one's own " * 99)
    code, message = run("convert", make_checkpoint(), "out", "--calibration", "./bundled", *FEW, "--dry-run")
    assert code == 0 and "256 tokens of bundled" in message and bundled.NAME not in message


def test_parts_and_their_merge(make_checkpoint, tmp_path):
    source = make_checkpoint()
    for name, blocks in (("a", "0:2"), ("b", "2:3")):
        assert run("convert", source, tmp_path / name, "--blocks", blocks, *FEW)[0] == 0
    assert run("merge", tmp_path / "merged", tmp_path / "a", tmp_path / "b")[0] == 0
    assert run("convert", source, tmp_path / "whole", *FEW)[0] == 0
    assert digests(tmp_path / "merged") == digests(tmp_path / "whole")


def test_a_run_goes_on_with_the_same_default(make_checkpoint, tmp_path):
    source = make_checkpoint()

    def dying(stage: str, done: int, total: int, written: int = 0) -> None:
        if stage == "convert" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        b.convert(source, tmp_path / "out", calibration_tokens=300, progress=dying)
    with pytest.raises(BismoothError, match=r"recipe.calibration: bundled calibration text \(.*\) there, None now"):
        b.convert(source, tmp_path / "out", calibration="none")
    assert b.convert(source, tmp_path / "out", calibration="bundled", calibration_tokens=300).resumed == 2
    b.convert(source, tmp_path / "whole", calibration_tokens=300)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("options", [(), ("--dry-run",), ("--method", "auto", "--group-size", "32")])
def test_without_a_tokenizer_the_remedy_works(make_checkpoint, tmp_path, options):
    """Not in silence without data: that costs accuracy."""
    source, out = make_checkpoint(), tmp_path / "out"
    drop("tokenizer*")(source)
    code, message = run("convert", source, out, *options)
    assert code == 2 and "no usable tokenizer for the calibration text" in message and not out.exists()
    assert "or use --calibration none" in message and message.count("\n  also:") == 0
    code, message = run("convert", source, out, *options, "--calibration", "none")
    if "auto" in options:
        assert code == 2 and "--method bismooth" in message
    else:
        assert code == 0


def test_analyze_takes_it_when_asked(make_checkpoint):
    source = make_checkpoint()
    code, message = run("analyze", source, "--json", "--calibration", "bundled", *FEW)
    assert code == 0 and json_of(message)["calibration"]["files"] == [bundled.NAME]
    code, message = run("analyze", source, "--json")
    assert code == 0 and json_of(message)["calibration"] is None
