"""A run may die anywhere; the next one goes on, and nobody can tell from the result."""

import shutil
import signal
import subprocess
import sys
from itertools import pairwise

import pytest

from tests.support.command import run
from tests.support.contents import digests
from tests.support.conversion import convert
from tests.support.damage import edit_json
from tests.support.disk import Failing
from tests.support.sweep import sweep
from vllm_w8a8_bismooth.errors import BismoothError, Interrupted
from vllm_w8a8_bismooth.measure.calibration import Calibration
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.recipe import Recipe

ARMS = {
    "rtn": (Recipe.of("rtn", head="int8"), False),
    "mixed": (Recipe.of("mixed", group_size=32), False),
    "calibrated": (Recipe.of("bismooth", calibration_tokens=500), True),
    "data-free": (Recipe.of("bismooth"), False),
    "rows": (Recipe.of("bismooth", bits=6, group_size=32, calibration_tokens=500), True),
    "rows, data-free": (Recipe.of("bismooth", bits=6, group_size=32), False),
}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("vllm_w8a8_bismooth.checkpoint.writer.SHARD_SIZE", "60KB")


@pytest.mark.parametrize("arm", sweep(ARMS))
def test_a_run_that_fails_anywhere_is_resumed(make_checkpoint, tmp_path, calibration_text, arm, monkeypatch):
    source, (recipe, calibrated) = make_checkpoint(), ARMS[arm]
    text = read_text(calibration_text) if calibrated else None
    with monkeypatch.context() as patch:
        counter, finished = Failing(patch, 10**9), []
        convert(source, tmp_path / "whole", recipe, text, progress=lambda *shown: finished.append(counter.count))
    expected = digests(tmp_path / "whole")
    resumed = set()
    within = [(before + after) // 2 for before, after in pairwise([*finished, counter.count])]  # every block
    spread = range(5, counter.count, max(1, counter.count // 12))
    steps = sorted({1, 2, *within, *spread, counter.count - 1, counter.count})
    for last in steps:
        out = tmp_path / f"out-{last}"
        with monkeypatch.context() as patch:
            Failing(patch, last, once=last % 2 == 0)
            with pytest.raises((Interrupted, BismoothError)):
                convert(source, out, recipe, text)
            assert not out.exists()
        resumed.add(convert(source, out, recipe, text).resumed)
        assert digests(out) == expected and not out.with_name(out.name + ".partial").exists()
    assert resumed == {0, 1, 2, 3}, "the runs failed in different blocks"


@pytest.mark.parametrize(("rounding", "blocks"), [("nearest", [0, 1, 2]), ("gptq", [0, 0, 1, 2])])
def test_what_is_kept_is_not_made_again(make_checkpoint, tmp_path, calibration_text, monkeypatch, rounding, blocks):
    """How the inputs of a block go together is not kept: gathered again, it is the same."""
    source, text = make_checkpoint(), read_text(calibration_text)
    recipe = Recipe.of("bismooth", calibration_tokens=500, rounding=rounding)
    advance, advanced = Calibration.advance, []

    def counting(self, index, *arguments):
        advanced.append(index)
        return advance(self, index, *arguments)

    def dying(*arguments, **options):
        raise Interrupted.of("disk", "full after the statistics of a block, before its conversion", "make room")

    monkeypatch.setattr(Calibration, "advance", counting)
    with monkeypatch.context() as patch:
        patch.setattr("vllm_w8a8_bismooth.conversion.stages.smooth_block", dying)
        with pytest.raises(Interrupted):
            convert(source, tmp_path / "out", recipe, text)
    convert(source, tmp_path / "out", recipe, text)
    assert advanced == blocks
    convert(source, tmp_path / "whole", recipe, text)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("call", sweep(["rmtree", "pwrite", "fdatasync", "replace"]))
def test_killed_runs_are_resumed(make_checkpoint, tmp_path, call):
    """SIGKILL in a real process; the last case dies when the folder has its name already."""
    source, out = make_checkpoint(), tmp_path / "out"
    script = (
        "import os, shutil, signal, sys; from vllm_w8a8_bismooth.checkpoint import writer\n"
        "from vllm_w8a8_bismooth.cli import main as cli\n"
        "writer.SHARD_SIZE = '60KB'\n"
        f"owner = shutil if {call!r} == 'rmtree' else os\n"
        f"count, real = 0, getattr(owner, {call!r})\n"
        "def dying(*arguments, **options):\n"
        "    global count; count += 1\n"
        f"    if count == {1 if call == 'rmtree' else 3}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*arguments, **options)\n"
        f"setattr(owner, {call!r}, dying)\n"
        f"sys.argv = ['bismooth', 'convert', {str(source)!r}, {str(out)!r}, '--method', 'rtn']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert out.exists() == (call == "rmtree") and (out.exists() or out.with_name("out.partial").exists())
    assert run("convert", source, out, "--method", "rtn")[0] == 0
    convert(source, tmp_path / "whole", Recipe.of("rtn"))
    assert digests(out) == digests(tmp_path / "whole") and not out.with_name("out.partial").exists()


def test_a_state_that_is_gone_starts_the_run_anew(make_checkpoint, tmp_path, calibration_text):
    source, text, recipe = make_checkpoint(), read_text(calibration_text), Recipe.of("bismooth", calibration_tokens=500)

    def interrupted(stage, done, total, written):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", recipe, text, progress=interrupted)
    states = list((tmp_path / "out.partial" / ".bismooth").glob("*.safetensors"))
    assert states
    for state in states:
        state.write_bytes(b"spoilt")
    with pytest.raises(BismoothError, match="the state stream-00001 of an earlier run is gone.*starts anew"):
        convert(source, tmp_path / "out", recipe, text)
    assert convert(source, tmp_path / "out", recipe, text).resumed == 0


def test_an_unfinished_run_is_not_continued_as_another(make_checkpoint, tmp_path, calibration_text, monkeypatch):
    source, out = make_checkpoint(), tmp_path / "out"
    with monkeypatch.context() as patch:
        Failing(patch, 12)
        with pytest.raises(Interrupted, match="goes on where it stopped"):
            convert(source, out, Recipe.of("bismooth"))
    before = digests(tmp_path / "out.partial")
    for recipe, text, difference in (
        (Recipe.of("bismooth", smoothing="alpha"), None, "recipe.alpha: None there, 0.5 now"),
        (Recipe.of("bismooth"), read_text(calibration_text), "recipe.calibration: None there, calibration.txt ("),
    ):
        with pytest.raises(BismoothError, match="unfinished conversion of another kind") as caught:
            convert(source, out, recipe, text)
        assert difference in str(caught.value)
    edit_json(source / "config.json", lambda config: config.update(rope_theta=5.0))
    with pytest.raises(BismoothError, match="the source's config.json was changed"):
        convert(source, out, Recipe.of("bismooth"))
    assert digests(tmp_path / "out.partial") == before


def test_interrupt_keeps_what_is_done(make_checkpoint, tmp_path, monkeypatch):
    source, out = make_checkpoint(), tmp_path / "out"

    def interrupted(stage, done, total, written):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, Recipe.of("rtn"), progress=interrupted)
    assert not out.exists()
    assert convert(source, out, Recipe.of("rtn")).resumed >= 1


PLAIN = {
    "a full disk": (
        "shutil.disk_usage",
        lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 10),
        "disk has 10 bytes",
    ),
    "out of memory": ("vllm_w8a8_bismooth.conversion.stages.quantize_folded", None, "no memory; close something"),
}
"""What meets a resumed run -> what is patched, by what, and what is said."""


@pytest.mark.parametrize("case", PLAIN)
def test_an_error_never_takes_what_another_run_finished(make_checkpoint, tmp_path, monkeypatch, case):
    source, out, partial = make_checkpoint(), tmp_path / "out", tmp_path / "out.partial"

    def interrupted(stage, done, total, written):
        if done == 1:
            raise KeyboardInterrupt

    def failing(*arguments, **options):
        raise BismoothError.of("here", "no memory", "close something")

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, Recipe.of("rtn"), progress=interrupted)
    name, instead, said = PLAIN[case]
    before = digests(partial)
    with monkeypatch.context() as patch:
        patch.setattr(name, instead or failing)
        for _ in range(2):
            code, message = run("convert", source, out, "--method", "rtn")
            assert code == 2 and said in message and f"{partial}: holds what is finished so far" in message
    assert digests(partial).keys() >= {file for file in before if file.startswith(".bismooth/convert-")} != set()
    assert convert(source, out, Recipe.of("rtn")).resumed >= 1


def test_an_error_takes_what_its_own_run_began(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(*PLAIN["a full disk"][:2])
    code, message = run("convert", make_checkpoint(), tmp_path / "out", "--method", "rtn")
    assert code == 2 and "holds what is finished" not in message and not (tmp_path / "out.partial").exists()
