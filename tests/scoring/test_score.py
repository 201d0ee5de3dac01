"""A score from its arguments to its table, with an engine that predicts what a test says."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import vllm_w8a8_bismooth as b
from tests.support.command import json_of, run
from tests.support.conversion import convert
from tests.support.damage import edit_json
from vllm_w8a8_bismooth import given
from vllm_w8a8_bismooth.errors import BismoothError, Interrupted
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.report import section
from vllm_w8a8_bismooth.scoring import score as room
from vllm_w8a8_bismooth.scoring import store

ASKED = {"tokens": 640, "window": 64}
VOCABULARY = 160


class Engines:
    """In the place of :class:`worker.Engine`: noise by model and window, in whichever order they are asked."""

    def __init__(self):
        self.computed: list[tuple[str, int]] = []
        self.fails_after = 10**9
        self.spoil = lambda model, scores: scores

    def __call__(self, model: Path, options: dict, log: Path) -> "Engines":
        self.model, self.options, self.answer = model, options, {}
        log.write_text("log\n")
        return self

    def windows(self, tokens, wanted, folder, ahead=None):
        ids = np.load(tokens)
        for number in wanted:
            if len(self.computed) >= self.fails_after:
                raise Interrupted.of("machine", "switched off", "switch it on")
            assert ahead is None or len(list(folder.glob("*.npy"))) < ahead
            scores = np.random.default_rng(number).normal(size=(ids.shape[1] - 1, VOCABULARY))
            if self.model.name == "out":
                scores += np.random.default_rng(99 + number).normal(size=scores.shape) / 10
            path = folder / f"{number:06d}.npy"
            np.save(path, self.spoil(self.model, scores).astype(np.float32))
            self.computed.append((self.model.name, number))
            yield number, path
        self.answer = {"dtype": "bfloat16", "quantization": "w8a8_bismooth", "version": "9.9"}


@pytest.fixture
def engines(monkeypatch, tmp_path) -> Engines:
    found = Engines()
    monkeypatch.setattr(room, "Engine", found)
    monkeypatch.setattr("vllm_w8a8_bismooth.engine.refuse_absence", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


@pytest.fixture
def source(make_checkpoint) -> Path:
    return make_checkpoint()


@pytest.fixture
def out(source, tmp_path, calibration_text) -> Path:
    convert(source, tmp_path / "out", Recipe.of("bismooth", calibration_tokens=200), read_text(calibration_text))
    return tmp_path / "out"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "heldout.txt"
    path.write_text("".join(chr(97 + (i * i * i) % 25) for i in range(3000)))
    return path


def test_what_is_found(engines, source, out, text):
    steps = []
    found = b.score(out, against=source, text=text, **ASKED, progress=lambda *step: steps.append(step[:3]))
    assert found.windows == 10 and found.length == 64 and found.predicted == 630 and not found.notes
    assert 0 < found.divergence.kl_median < found.divergence.kl < found.divergence.kl_p999 < found.divergence.kl_worst
    assert found.divergence.kl_interval[0] < found.divergence.kl < found.divergence.kl_interval[1]
    assert 0.5 < found.divergence.top1 < 1 and found.dtypes == ("bfloat16", "bfloat16") and found.vllm == "9.9"
    assert found.worst_text and len(found.worst_text) == 1 and found.reused == 0
    assert ("engine", 0, 2) in steps and ("source", 10, 10) in steps and ("checkpoint", 10, 10) in steps
    stored = found.as_dict()
    assert json.loads(json.dumps(stored)) and stored["divergence"]["kl"] == found.divergence.kl
    assert stored["folder"] == str(out) and stored["predicted"] == 630
    again = b.score(out, against=str(source), text=[str(text)], **ASKED)
    assert again.divergence == found.divergence and again.reused == 10
    assert [name for name, _ in engines.computed] == ["source"] * 10 + ["out"] * 20


def test_the_source_itself(engines, source, text):
    found = b.score(source, against=source, text=text, **ASKED)
    assert found.divergence.kl == 0 and found.divergence.top1 == 1 and found.divergence.log_ratio == 0


@pytest.mark.parametrize("after", [3, 10, 14])
def test_a_run_that_was_interrupted_goes_on(engines, source, out, text, after):
    """Killed while the source, between both, and while the checkpoint is scored: no window is computed twice."""
    engines.fails_after = after
    with pytest.raises(Interrupted, match="switched off"):
        b.score(out, against=source, text=text, **ASKED)
    engines.fails_after = 10**9
    found = b.score(out, against=source, text=text, **ASKED)
    assert sorted(engines.computed) == [(name, number) for name in ("out", "source") for number in range(10)]
    assert found.reused == min(after, 10)
    whole = b.score(out, against=source, text=text, **ASKED)
    assert whole.divergence == found.divergence


def test_what_the_sources_scores_depend_on(engines, source, out, text, tmp_path):
    """Another text, number of tokens, dtype or weight is another store; a card or a folder's name is none."""

    def computes(**changes) -> bool:
        before = engines.computed.count(("source", 0)) + engines.computed.count(("moved", 0))
        b.score(**{"folder": out, "against": source, "text": text, **ASKED, **changes})
        return engines.computed.count(("source", 0)) + engines.computed.count(("moved", 0)) > before

    assert computes() and not computes()
    assert computes(tokens=512) and computes(window=32) and computes(dtype="float32")
    assert computes(tensor_parallel_size=2) and engines.options == {"dtype": "auto", "tensor_parallel_size": 2}
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    assert computes(text=other)
    (source / "README.md").write_text("# Words")
    source.rename(tmp_path / "moved")
    assert not computes(against=tmp_path / "moved")
    os.utime(next((tmp_path / "moved").glob("*.safetensors")), (1, 1))
    assert computes(against=tmp_path / "moved")


def test_one_run_at_a_time(engines, source, out, text):
    found = b.score(out, against=source, text=text, **ASKED)
    with open(found.store / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BismoothError, match="another score is using it"):
            b.score(out, against=source, text=text, **ASKED)


def test_only_the_sources_windows_stay(engines, source, out, text):
    found = b.score(out, against=source, text=text, **ASKED)
    left = {path.relative_to(found.store).parts[0] for path in found.store.rglob("*")}
    assert left == {"source", "source.json", "source.log", "checkpoint.log", "tokens.npy", "identity.json", "lock"}


def test_the_card(engines, source, out, text):
    before = (out / "README.md").read_bytes()
    b.score(out, against=source, text=text, **ASKED)
    assert (out / "README.md").read_bytes() == before
    b.score(out, against=source, text=text, **ASKED, write_card=True)
    once = (out / "README.md").read_bytes()
    assert section.without(once) == before and b"| same best token | " in once and b"`heldout.txt`" in once
    b.score(out, against=source, text=text, **ASKED, write_card=True)
    assert (out / "README.md").read_bytes() == once
    (out / "README.md").write_bytes(once + b"My own words.\n")
    b.score(out, against=source, text=text, tokens=320, window=64, write_card=True)
    twice = (out / "README.md").read_bytes()
    assert twice.endswith(b"My own words.\n") and b"in 5 windows" in twice and b"in 10 windows" not in twice
    (out / "README.md").write_text(section.BEGIN)
    engines.fails_after = 0  # before any engine starts
    with pytest.raises(BismoothError, match="which should enclose one table"):
        b.score(out, against=source, text=text, **ASKED, write_card=True)


def test_notes(engines, source, out, text, calibration_text, tmp_path):
    found = b.score(out, against=source, text=calibration_text, **ASKED)
    assert found.notes == ["The checkpoint was calibrated on this very text, which flatters it: score it on another"]
    found = b.score(out, against=source, text=text)  # 8192 tokens
    assert found.length == 127 and "The text gives 2,921 of the 8,192 tokens asked for" in found.notes
    found = b.score(out, against=source, text=text, tokens=64, window=64)
    assert any("One window has no confidence intervals" in note for note in found.notes)
    assert found.divergence.kl_interval is None
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "' + "abc" * 300 + '"}\n{"number": 1}\n')
    found = b.score(out, against=source, text=rows, tokens=128, window=64)
    assert len(found.notes) == 1 and found.notes[0].startswith("Skipped 1 of 2 rows of text (rows.jsonl line 2: ")


def test_the_source_that_the_recipe_names(engines, source, out, text, tmp_path, monkeypatch):
    assert b.score(out, text=text, **ASKED).source == source
    edit_json(out / "recipe.json", lambda recipe: recipe["provenance"].update(source="elsewhere"))
    with pytest.raises(BismoothError, match="was made from elsewhere, and no such .*; name it with --against SRC"):
        b.score(out, text=text, **ASKED)
    edit_json(out / "recipe.json", lambda recipe: recipe["provenance"].update(source="org/elsewhere"))
    with pytest.raises(BismoothError, match="in the Hub's cache; name it with --against SRC"):
        b.score(out, text=text, **ASKED)
    (out / "recipe.json").unlink()
    with pytest.raises(BismoothError, match="no recipe.json in it names its source; name it with --against SRC"):
        b.score(out, text=text, **ASKED)


def grown(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(vocab_size=200))


def renumbered(folder: Path) -> None:
    edit_json(folder / "tokenizer.json", lambda t: t["model"]["vocab"].update({"a": 66, "b": 65}))


def cut_off(folder: Path) -> None:
    """As quantizers leave it, which changes no token's number."""
    edit_json(folder / "tokenizer.json", lambda t: t.update(truncation={"max_length": 3}, padding=None))


def classifier(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(architectures=["LlamaForSequenceClassification"]))


BAD = {
    "size": (grown, "has a vocabulary of 200, and .*source one of 160; name with --against the checkpoint"),
    "numbers": (renumbered, "numbers tokens otherwise than that of .*source .1 differ, "),
    "classifier": (classifier, "for embeddings or classification, which predicts no tokens"),
    "embedder": (lambda f: (f / "modules.json").write_text("[]"), "which predicts no tokens"),
    "part": (lambda f: (f / "part.json").write_text("{}"), "a part of a checkpoint; bismooth merge"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: not found"),
    "no folder": (shutil.rmtree, "no such folder"),
    "damaged": (lambda f: (f / "tokenizer.json").write_text("{"), "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_checkpoints_that_cannot_be_compared(engines, source, out, text, case):
    spoil, message = BAD[case]
    spoil(out)
    code, said = run("score", out, "--against", source, "--text", text)
    assert code == 2 and said.count("; ") >= 1 and "also:" not in said
    with pytest.raises(BismoothError, match=message):
        b.score(out, against=source, text=text, **ASKED)
    assert not engines.computed


def test_differences_of_tokenizers_that_change_no_number(engines, source, out, text):
    cut_off(out)
    assert b.score(out, against=source, text=text, **ASKED).windows == 10
    (out / "tokenizer.json").unlink()
    assert b.score(out, against=source, text=text, **ASKED).windows == 10


TEXTS = {
    "absent": (lambda path: path.unlink(), "cannot be read"),
    "empty": (lambda path: path.write_text(""), "the file is empty; give it text$"),
    "short": (lambda path: path.write_text("seven"), "gives 5 tokens, and a window has 16 at least; give a longer"),
    "binary": (lambda path: path.write_bytes(b"%PDF-1.7\n\xff\xfe\x00" * 50), "heldout.txt: "),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts_that_cannot_be_scored(engines, source, out, text, case):
    spoil, message = TEXTS[case]
    spoil(text)
    with pytest.raises(BismoothError, match=message) as caught:
        b.score(out, against=source, text=text, **ASKED)
    assert "calibration" not in str(caught.value)


def test_a_source_without_tokenizer(engines, source, out, text):
    for path in source.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BismoothError, match="no usable tokenizer") as caught:
        b.score(out, against=source, text=text, **ASKED)
    assert "calibration" not in str(caught.value)


def test_the_disk_is_too_small(engines, source, out, text, monkeypatch):
    monkeypatch.setattr("vllm_w8a8_bismooth.checkpoint.files.free_space", lambda folder: 1000)
    with pytest.raises(BismoothError, match="the store of scores needs 17.30 MB, the disk has 1.00 KB free"):
        b.score(out, against=source, text=text, **ASKED)
    assert not engines.computed


def test_predictions_that_are_no_numbers(engines, source, out, text):
    engines.spoil = lambda model, scores: scores * (np.nan if model == out else 1)
    with pytest.raises(BismoothError, match="out: predicts NaN in window 0; repair"):
        b.score(out, against=source, text=text, **ASKED)
    engines.spoil = lambda model, scores: scores[:, : -1 if model == out else None]
    with pytest.raises(BismoothError, match="predicts 159 tokens with it, and 160"):
        b.score(out, against=source, text=text, **ASKED)


def test_without_vllm(engines, source, out, text, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BismoothError, match="vLLM is not installed here; run it in the environment that serves"):
        b.score(out, against=source, text=text, **ASKED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, "needs a text .*; give text like .*--text FILE"),
        ({"text": []}, "needs a text"),
        ({"text": ""}, "is empty"),
        ({"tokens": 3}, "--tokens 3: too few; give a number from 16 on"),
        ({"window": 0}, "--window 0: too few"),
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size 0: too few; give a number from 1 on"),
        ({"dtype": "int8"}, "--dtype int8: not known; give one of auto, bfloat16, float32, float16"),
    ],
)
def test_arguments_that_are_refused(engines, source, out, text, changes, message):
    with pytest.raises(BismoothError, match=message):
        b.score(**{"folder": out, "against": source, "text": text, **changes})


@pytest.mark.parametrize(
    "changes",
    [{"folder": 7}, {"against": 7}, {"text": 7}, {"tokens": "9"}, {"window": True}, {"dtype": None},
     {"write_card": 1}, {"progress": 3}],
    ids=str,
)  # fmt: skip
def test_wrong_kinds_are_named(engines, source, out, text, changes):
    with pytest.raises(TypeError) as caught:
        b.score(**{"folder": out, "against": source, "text": text, **changes})
    (name,) = ({"against": "source"}.get(next(iter(changes)), next(iter(changes))),)
    assert name in str(caught.value)


def test_the_command(engines, source, out, text):
    words = ("score", out, "--against", source, "--text", text, "--tokens", 640, "--window", 64)
    code, said = run(*words)
    assert code == 0
    for part in (
        "10 windows of 64 tokens; up to 0.02 GB go to ",
        "KL divergence, nats a token: mean",
        "same best token",
        "perplexity of the checkpoint",
        "The worst is token ",
        "630 tokens in 10 windows of 64, vLLM 9.9, computed in bfloat16.",
        "source: 10 of 10 windows",
        "until: rm -r ",
    ):
        assert part in said, said
    code, said = run(*words, "--json", "--write-card")
    assert code == 0 and "10 of them kept from an earlier run" in said and "The table is in " in said
    found = json_of(said)
    assert found["windows"] == 10 and found["divergence"]["kl_interval"] and found["reused"] == 10
    code, said = run(*words, "--text", "-", "--text", "-")
    assert (code, said) == (2, "--text -: given twice, and can be read once; leave out one of the two")
    assert run("score", out)[0] == 2


def test_an_interrupt_says_that_it_goes_on(engines, source, out, text, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(given, "prepare_score", interrupt)
    said = "Interrupted; the same command goes on from there\n"
    assert run("score", out, "--text", text) == (130, said)


def test_where_scores_are_kept(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert store.default_root() == Path("/caches/bismooth/scores")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.default_root() == Path.home() / ".cache/bismooth/scores"
