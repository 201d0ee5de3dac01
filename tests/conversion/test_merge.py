"""Parts that several machines converted become what one would have written, or the merge says what is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.support.command import json_of, run
from tests.support.contents import digests
from tests.support.conversion import convert
from tests.support.damage import edit_json, edit_shard
from tests.support.disk import Failing
from tests.support.models import tiny_model, write_checkpoint
from tests.support.sweep import sweep
from vllm_w8a8_bismooth.checkpoint.files import sha256
from vllm_w8a8_bismooth.conversion import merge as merging
from vllm_w8a8_bismooth.conversion import part
from vllm_w8a8_bismooth.conversion.merge import prepare
from vllm_w8a8_bismooth.errors import BismoothError, Interrupted
from vllm_w8a8_bismooth.measure.calibration import Calibration
from vllm_w8a8_bismooth.measure.prior import Prior
from vllm_w8a8_bismooth.measure.text import CalibrationText, read_text
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.report.outcome import Outcome
from vllm_w8a8_bismooth.verification import verify

RTN, DATA_FREE = Recipe.of("rtn"), Recipe.of("bismooth")
CALIBRATED = Recipe.of("bismooth", calibration_tokens=500)
ARMS = {
    "rtn": (RTN, False),
    "mixed": (Recipe.of("mixed", group_size=32), False),
    "data-free": (DATA_FREE, False),
    "calibrated": (CALIBRATED, True),
    "named": (Recipe.of("bismooth", group_size=32, group_layers=r"1\.mlp\.d", ignore=r"2\.self_attn\.k"), False),
}
SPLITS = [(0, 3), (0, 1, 3), (0, 2, 3), (0, 1, 2, 3)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("vllm_w8a8_bismooth.checkpoint.writer.SHARD_SIZE", "40KB")


def outliers(folder: Path, model_type: str = "llama", **changes) -> Path:
    """A small checkpoint with outlier columns in every second block, for which mixed granularity has a choice."""
    model = tiny_model(model_type, **changes)
    for name, tensor in model.state_dict().items():
        if name.endswith("q_proj.weight") and int(name.split(".")[2]) % 2:
            tensor[:, 5] *= 1000
    return write_checkpoint(folder, model)


def parts_of(
    source: Path, folder: Path, recipe: Recipe, text: CalibrationText | None = None, ends: Sequence[int] = (0, 2, 3)
) -> list[Path]:
    """Parts that meet at ``ends``, each made as on a machine of its own."""
    made = []
    for first, end in zip(ends, ends[1:], strict=False):
        made.append(folder / f"part-{first}-{end}")
        convert(source, made[-1], recipe, text, blocks=slice(first, end))
    return made


def merge(parts: Sequence[Path], destination: Path, **options) -> Outcome:
    return merging.merge(prepare(parts, destination), **options)


@pytest.mark.parametrize("arm", sweep(ARMS))
def test_merged_parts_are_the_whole(tmp_path, calibration_text, arm):
    """Byte for byte, report and card included, wherever the cuts are, in any order, by any number of threads."""
    source, (recipe, calibrated) = outliers(tmp_path / "source"), ARMS[arm]
    text = read_text(calibration_text) if calibrated else None
    whole = convert(source, tmp_path / "whole", recipe, text)
    expected, cores, made = digests(tmp_path / "whole"), torch.get_num_threads(), {}
    grouped = [name for name, entry in whole.linears.items() if entry["group_size"]]
    assert bool(grouped) == (arm in ("mixed", "named")) and len(whole.files) > 3
    try:
        for ends in SPLITS:
            spans = list(zip(ends, ends[1:], strict=False))
            for threads, (first, end) in enumerate(spans, 1):
                if (first, end) not in made:
                    torch.set_num_threads(threads)
                    made[first, end] = tmp_path / f"{first}-{end}"
                    report = convert(source, made[first, end], recipe, text, blocks=slice(first, end))
                    names = [name for name in whole.linears if first <= int(name.split(".")[2]) < end]
                    assert report.linears == {name: whole.linears[name] for name in names}
            before = {span: digests(made[span]) for span in spans}
            out = tmp_path / f"out-{len(spans)}-{ends[1]}"
            report = merge([made[span] for span in reversed(spans)], out)
            assert digests(out) == expected and not out.with_name(f"{out.name}.partial").exists()
            assert replace(report, destination=whole.destination, left_out=whole.left_out) == whole
            assert before == {span: digests(made[span]) for span in spans}
    finally:
        torch.set_num_threads(cores)
    assert verify(out, source, engine=False).ok


@pytest.mark.parametrize("model_type", sweep(["qwen2_moe", "gemma2", "mixtral", "phi3"]))
def test_of_other_types(tmp_path, calibration_text, model_type):
    source = outliers(tmp_path / "source", model_type, tie_word_embeddings=True)
    for name, recipe, text in (("free", DATA_FREE, None), ("calibrated", CALIBRATED, read_text(calibration_text))):
        convert(source, tmp_path / name / "whole", recipe, text)
        merge(parts_of(source, tmp_path / name, recipe, text, (0, 1, 3)), tmp_path / name / "out")
        assert digests(tmp_path / name / "out") == digests(tmp_path / name / "whole")


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    return outliers(tmp_path_factory.mktemp("deep") / "source", num_hidden_layers=6)


@pytest.mark.slow
@settings(max_examples=6)
@given(cuts=st.sets(st.integers(1, 5)), shard=st.integers(5, 80), arm=st.sampled_from(["mixed", "data-free"]))
def test_any_cuts_and_any_shards(deep, tmp_path_factory, cuts, shard, arm):
    folder, recipe = tmp_path_factory.mktemp("cuts"), ARMS[arm][0]
    with pytest.MonkeyPatch.context() as patch:
        convert(deep, folder / "whole", recipe)
        patch.setattr("vllm_w8a8_bismooth.checkpoint.writer.SHARD_SIZE", f"{shard}KB")
        made = parts_of(deep, folder, recipe, ends=(0, *sorted(cuts), 6))
        patch.undo()
        patch.setattr("vllm_w8a8_bismooth.checkpoint.writer.SHARD_SIZE", "40KB")
        patch.setattr(merging, "_PIECE", 1000)
        merge(made, folder / "out")
    assert digests(folder / "out") == digests(folder / "whole")


@pytest.mark.parametrize("arm", sweep(["mixed", "data-free", "calibrated"]))
def test_a_part_that_fails_anywhere_is_resumed(make_checkpoint, tmp_path, calibration_text, arm, monkeypatch):
    source, (recipe, calibrated) = make_checkpoint(), ARMS[arm]
    text, blocks = read_text(calibration_text) if calibrated else None, slice(2, 3)
    with monkeypatch.context() as patch:
        counter = Failing(patch, 10**9)
        convert(source, tmp_path / "whole", recipe, text, blocks=blocks)
    for last in sorted({1, 2, *range(3, counter.count, max(1, counter.count // 8)), counter.count}):
        out = tmp_path / f"out-{last}"
        with monkeypatch.context() as patch:
            Failing(patch, last, once=last % 2 == 0)
            with pytest.raises((Interrupted, BismoothError)):
                convert(source, out, recipe, text, blocks=blocks)
            assert not out.exists()
        convert(source, out, recipe, text, blocks=blocks)
        assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize(("kind", "recipe"), [(Calibration, CALIBRATED), (Prior, DATA_FREE)])
@pytest.mark.parametrize("dies", [("carry", 1), ("carry", 2), ("convert", 0), ("convert", 1)])
def test_activations_are_carried_once(make_checkpoint, tmp_path, calibration_text, monkeypatch, kind, recipe, dies):
    source, out, advance, advanced = make_checkpoint(num_hidden_layers=4), tmp_path / "out", kind.advance, []
    text = read_text(calibration_text) if kind is Calibration else None

    def counting(self, index, *arguments):
        advanced.append(index)
        return advance(self, index, *arguments)

    def dying(stage, done, total, written):
        if (stage, done) == dies:
            raise KeyboardInterrupt

    monkeypatch.setattr(kind, "advance", counting)
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, recipe, text, progress=dying, blocks=slice(2, None))
    assert not out.exists()
    convert(source, out, recipe, text, blocks=slice(2, None))
    assert advanced == [0, 1, 2, 3]
    convert(source, tmp_path / "whole", recipe, text, blocks=slice(2, None))
    assert digests(out) == digests(tmp_path / "whole")


def test_what_needs_no_activations_reads_its_own_blocks_only(make_checkpoint, tmp_path):
    """A NaN in another block is another part's affair."""
    source = make_checkpoint()
    edit_shard(source, lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"].fill_(float("nan")))
    convert(source, tmp_path / "rtn", RTN, blocks=slice(2, 3))
    for recipe, blocks in ((RTN, slice(1, 2)), (DATA_FREE, slice(2, 3))):
        with pytest.raises(BismoothError, match="layers.1.self_attn.q_proj.weight: holds nan"):
            convert(source, tmp_path / "out", recipe, blocks=blocks)
    assert not list(tmp_path.glob("out*"))


def test_a_merge_that_fails_anywhere_is_resumed(make_checkpoint, tmp_path, monkeypatch):
    source = make_checkpoint()
    made = parts_of(source, tmp_path, RTN)
    convert(source, tmp_path / "whole", RTN)
    with monkeypatch.context() as patch:
        counter = Failing(patch, 10**9)
        merge(made, tmp_path / "counted")
    failures = 0
    for last in sorted({1, 2, *range(3, counter.count, max(1, counter.count // 7)), counter.count}):
        out = tmp_path / f"out-{last}"
        with monkeypatch.context() as patch:
            Failing(patch, last, once=last % 2 == 0)
            try:
                merge(made, out)  # how often it flushes depends on the threads: the last calls may not happen
            except (Interrupted, BismoothError):
                assert not out.exists()
                failures += 1
        merge(made, out)
        assert digests(out) == digests(tmp_path / "whole") and not out.with_name(f"{out.name}.partial").exists()
    assert failures > 6


def test_a_merge_does_not_copy_twice(make_checkpoint, tmp_path, monkeypatch):
    made, out, copy, copied = parts_of(make_checkpoint(), tmp_path, RTN), tmp_path / "out", merging._copy, []
    shards = [(folder, name) for folder in made for name in part.Part(folder).shards]
    assert len(shards) > 4

    def counting(of, shard, writer):
        copied.append((of.folder, shard))
        return copy(of, shard, writer)

    def dying(stage, done, total, written):
        if done == len(shards) - 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(merging, "_copy", counting)
    with pytest.raises(KeyboardInterrupt):
        merge(made, out, progress=dying)
    copied.clear()
    merge(made, out)
    assert len(copied) < len(shards) - 2 and shards[-1] in copied
    copied.clear()
    again = merge(made, out)
    assert not copied
    assert replace(merge(made, tmp_path / "anew"), destination=out, reused=True) == again


@pytest.mark.parametrize("verb", sweep(["merge", "convert"]))
def test_killed_processes_are_resumed(make_checkpoint, tmp_path, verb):
    source, out, first = make_checkpoint(), tmp_path / "out", tmp_path / "part-0-2"
    parts_of(source, tmp_path, DATA_FREE)
    command = {
        "convert": [source, out, "--calibration", "none", "--blocks", "0:2"],
        "merge": [out, first, tmp_path / "part-2-3"],
    }[verb]
    script = (
        "import os, signal, sys; from vllm_w8a8_bismooth.checkpoint import writer\n"
        "from vllm_w8a8_bismooth.cli import main as cli\n"
        "writer.SHARD_SIZE = '40KB'\n"
        "count, real = 0, os.fdatasync\n"
        "def dying(descriptor):\n"
        "    global count; count += 1\n"
        "    if count == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(descriptor)\n"
        "os.fdatasync = dying\n"
        f"sys.argv = {['bismooth', verb, *map(str, command)]!r}; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists() and out.with_name("out.partial").exists()
    assert run(verb, *command)[0] == 0
    if verb == "merge":
        convert(source, tmp_path / "whole", DATA_FREE)
    assert digests(out) == digests(tmp_path / "whole" if verb == "merge" else first)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def shard(folder: Path, number: int = 0) -> Path:
    return sorted(folder.glob("part-*.safetensors"))[number]


def rename_tensor(folder: Path) -> None:
    tensors = load_file(shard(folder))
    name = next(iter(tensors))
    save_file({"model.layers.7.x" if n == name else n: t for n, t in tensors.items()}, shard(folder))


def digit(folder: Path) -> None:
    flip(folder / "part.json", (folder / "part.json").read_text().index('"column_error": 0.0') + 20)


def of_version(folder: Path) -> None:
    stored = json.loads((folder / "part.json").read_text())
    stored["part"]["identity"]["versions"]["vllm_w8a8_bismooth"] = "9.9"
    stored["sha256"] = part._digest(stored["part"])
    (folder / "part.json").write_text(json.dumps(stored))


def of_torch(folder: Path) -> None:
    stored = json.loads((folder / "part.json").read_text())
    stored["part"]["identity"]["versions"]["torch"] = "1.0"
    stored["sha256"] = part._digest(stored["part"])
    (folder / "part.json").write_text(json.dumps(stored))


def again(recipe: Recipe = DATA_FREE, change: Callable[[Path], None] = lambda source: None):
    """Makes the second part again, in another way or of another source."""

    def convert_again(folder: Path) -> None:
        shutil.rmtree(folder)
        change(folder.parent / "source")
        convert(folder.parent / "source", folder, recipe, blocks=slice(2, 3))

    return convert_again


def unfinished(folder: Path) -> None:
    def dying(*_):
        raise KeyboardInterrupt

    shutil.rmtree(folder)
    with pytest.raises(KeyboardInterrupt):
        convert(folder.parent / "source", folder, DATA_FREE, progress=dying, blocks=slice(2, 3))


def whole(folder: Path) -> None:
    shutil.rmtree(folder)
    convert(folder.parent / "source", folder, DATA_FREE)


def of_another_shape(source: Path) -> None:
    shutil.rmtree(source)
    write_checkpoint(source, tiny_model("llama", vocab_size=192))


def one_weight(block: int):
    name = f"model.layers.{block}.mlp.up_proj.weight"
    return lambda source: edit_shard(source, lambda tensors: tensors[name][3, 4].add_(1.0), name)


DAMAGE = {
    "bit of a tensor": (lambda p: flip(shard(p), -1), ["part-00001", "SHA-256 that it had", "copy the part again"]),
    "bit of a header": (lambda p: flip(shard(p), 8), ["part-00001", "truncated or corrupt", "copy the part again"]),
    "truncated": (lambda p: os.truncate(shard(p), 1000), ["part-00001", "truncated or corrupt"]),
    "absent": (lambda p: shard(p, 1).unlink(), ["part-00002", "absent"]),
    "renamed tensor": (rename_tensor, ["model.layers.7.x is not as", "is in none of its files"]),
    "part.json": (digit, ["part.json: damaged", "copy the part again"]),
    "no part.json": (lambda p: (p / "part.json").write_text("{"), ["part.json: not valid JSON"]),
    "side file": (lambda p: flip(p / "source/source/tokenizer.json", 20), ["tokenizer.json", "SHA-256 that part.json"]),
    "config": (lambda p: (p / "source/source/config.json").unlink(), ["source/config.json: absent"]),
    "version": (of_version, ["made by bismooth 9.9, and this is"]),
    "torch": (of_torch, ["of another conversion than", "versions.torch: '1.0' there"]),
    "recipe": (again(Recipe.of("bismooth", ignore="down")), ["recipe.ignore: ['down'] there, None now"]),
    "method": (again(RTN), ["recipe.method: 'rtn' there, 'bismooth' now"]),
    "config of the source": (
        again(change=lambda s: edit_json(s / "config.json", lambda c: c.update(rope_theta=5.0))),
        ["part-2-3: of another conversion than", "part-0-2 (the source's config.json is another)"],
    ),
    "side file of the source": (
        again(change=lambda s: (s / "NOTICE").write_text("x")),
        ["the source's NOTICE is another"],
    ),
    "shape in the source": (again(change=of_another_shape), ["lm_head.weight has another shape or dtype"]),
    "weight in the source": (again(change=one_weight(1)), ["the source's model.layers.1.mlp.up_proj.weight has other"]),
    "unfinished": (unfinished, ["part-2-3.partial: not finished", "run the command again"]),
    "whole": (whole, ["part-2-3/part.json: not found", "give the folder of a part"]),
    "gone": (shutil.rmtree, ["part-2-3/part.json: not found"]),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A folder with a source and two parts of it."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_w8a8_bismooth.checkpoint.writer.SHARD_SIZE", "20KB")
        parts_of(write_checkpoint(folder / "source", tiny_model("llama")), folder, DATA_FREE)
    return folder


@pytest.mark.parametrize("case", DAMAGE)
def test_wrong_parts_are_refused(pair, tmp_path, case):
    """With culprit and remedy, exit code 2, and nothing left behind."""
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    damage, says = DAMAGE[case]
    damage(tmp_path / "part-2-3")
    before = digests(tmp_path)
    code, text = run("merge", tmp_path / "out", tmp_path / "part-2-3", tmp_path / "part-0-2")
    assert code == 2 and all(words in text for words in says), text
    assert digests(tmp_path) == before and not list(tmp_path.glob("out*"))


def test_a_source_that_differs_where_nobody_could_tell(pair, tmp_path):
    """In a block of which only one part has read anything: the result is that of the source with this block."""
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    again(change=one_weight(2))(tmp_path / "part-2-3")
    merge([tmp_path / "part-2-3", tmp_path / "part-0-2"], tmp_path / "out")
    convert(tmp_path / "source", tmp_path / "whole", DATA_FREE)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


COVER = {
    "last": ([(0, 2), (2, 4)], ["blocks 4:6 are in none of the parts", "--blocks 4:6"]),
    "first": ([(1, 3), (3, 6)], ["blocks 0:1 are in none"]),
    "gaps": ([(1, 2), (4, 5)], ["blocks 0:1 are", "also: merge: blocks 2:4 are", "also: merge: blocks 5:6 are"]),
    "overlap": ([(0, 3), (2, 6)], ["blocks 2:3 are in ", "0-3 and in ", "2-6; leave one of the parts out"]),
    "inside": ([(0, 6), (2, 4)], ["blocks 2:4 are in "]),
    "twice": ([(0, 3), (0, 3), (3, 6)], ["blocks 0:3 are in "]),
    "both": ([(0, 2), (1, 3), (4, 6)], ["blocks 1:2 are in ", "blocks 3:4 are in none"]),
}


@pytest.fixture(scope="module")
def pieces(deep, tmp_path_factory) -> Callable[[int, int], Path]:
    folder = tmp_path_factory.mktemp("pieces")

    def piece(first: int, end: int) -> Path:
        convert(deep, folder / f"{first}-{end}", RTN, blocks=slice(first, end))
        return folder / f"{first}-{end}"

    return piece


@pytest.mark.parametrize("case", COVER)
def test_every_block_is_in_one_part(pieces, tmp_path, case):
    spans, says = COVER[case]
    code, text = run("merge", tmp_path / "out", *(pieces(*span) for span in spans))
    assert code == 2 and all(words in text for words in says), text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["", "inside", ".."])
def test_destinations_that_overlap_a_part(pair, tmp_path, where):
    shutil.copytree(pair, tmp_path / "all")
    folders = [tmp_path / "all" / name for name in ("part-0-2", "part-2-3")]
    before = digests(tmp_path)
    code, text = run("merge", folders[1] / where, *folders)
    assert code == 2 and "overlaps the part" in text and digests(tmp_path) == before


def test_destinations_that_hold_something_else(pair, tmp_path):
    folders = [pair / name for name in ("part-0-2", "part-2-3")]
    convert(pair / "source", tmp_path / "rtn", RTN)
    shutil.copytree(folders[0], tmp_path / "part")
    for name, says in (
        ("rtn", "holds another conversion (method: 'rtn' there"),
        ("part", "holds a part of a checkpoint"),
    ):
        before = digests(tmp_path)
        code, text = run("merge", tmp_path / name, *folders)
        assert code == 2 and says in text and digests(tmp_path) == before
    for blocks, says in (
        ((), "holds a part of a checkpoint"),
        (("--blocks", "0:1"), "blocks: 0:2 there, 0:1 now"),
        (("--blocks", ":2", "--method", "rtn"), "recipe.method: 'bismooth' there, 'rtn' now"),
    ):
        code, text = run("convert", pair / "source", tmp_path / "part", *blocks)
        assert code == 2 and says in text, text
    code, text = run("convert", pair / "source", tmp_path / "rtn", "--method", "rtn", "--blocks", "0:1")
    assert code == 2 and "holds a whole checkpoint" in text


def test_another_merge_is_not_continued(pair, tmp_path):
    folders = [pair / name for name in ("part-0-2", "part-2-3")]

    def dying(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(folders, tmp_path / "out", progress=dying)
    for command in (
        ("convert", pair / "source", tmp_path / "out"),
        ("merge", tmp_path / "out", *parts_of(pair / "source", tmp_path, RTN)),
    ):
        code, text = run(*command)
        assert code == 2 and "unfinished conversion of another kind" in text, text
    merge(folders, tmp_path / "out")


def test_a_part_is_no_checkpoint(pair):
    from transformers import AutoConfig

    code, text = run("verify", pair / "part-0-2")
    assert code == 2 and "a part of a checkpoint; bismooth merge" in text
    with pytest.raises((OSError, ValueError)):
        AutoConfig.from_pretrained(pair / "part-0-2", local_files_only=True)


def test_a_part_is_recognised_again(pair, tmp_path):
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    source, out = tmp_path / "source", tmp_path / "part-2-3"
    for path in source.rglob("*.safetensors"):
        os.utime(path)
    again = convert(source, out, DATA_FREE, blocks=slice(2, None))
    files = {path.name: sha256(path) for path in out.glob("*.safetensors")}
    first = convert(source, tmp_path / "anew", DATA_FREE, blocks=slice(2, None))  # in shards of another size
    assert again == replace(first, destination=out, reused=True, files=files)
    one_weight(0)(source)
    with pytest.raises(BismoothError, match="layers.0.mlp.up_proj.weight has other values"):
        convert(source, out, DATA_FREE, blocks=slice(2, None))


def test_the_command(make_checkpoint, tmp_path, calibration_text):
    source = make_checkpoint()
    options = ("--calibration", calibration_text, "--calibration-tokens", "256", "--rounding", "nearest")
    plans, reports = {}, {}
    for blocks in (":2", "2:"):
        command = ("convert", source, tmp_path / blocks[0], "--blocks", blocks, *options)
        code, text = run(*command, "--dry-run", "--json")
        assert code == 0 and not (tmp_path / blocks[0]).exists()
        plans[blocks] = json_of(text)
        code, text = run(*command, "--json")
        assert code == 0, text
        reports[blocks] = json_of(text)
        assert plans[blocks]["written_bytes"] == reports[blocks]["written_bytes"]
        assert plans[blocks]["shards"].keys() == {path.name for path in (tmp_path / blocks[0]).glob("*.safetensors")}
        assert plans[blocks]["part"] == reports[blocks]["part"]
        code, text = run(*command)
        assert code == 0 and "already holds this conversion" in text
    assert [plans[blocks]["part"] for blocks in plans] == [[0, 2], [2, 3]]
    # The second part has half the blocks of the first, but carries activations through those of the first.
    assert plans["2:"]["blocks"] == 1 and plans["2:"]["seconds"] > 0.6 * plans[":2"]["seconds"]
    parts, before = (tmp_path / "2", tmp_path / ":"), digests(tmp_path)
    code, text = run("merge", tmp_path / "out", *parts, "--dry-run", "--json")
    plan = json_of(text)
    assert code == 0 and list(plan["parts"].values()) == [[0, 2], [2, 3]] and not plan["reused"]
    code, text = run("merge", tmp_path / "out", *parts, "--dry-run")
    assert code == 0 and "the parts fit together" in text and digests(tmp_path) == before
    code, text = run("merge", tmp_path / "out", *parts, "--json")
    assert code == 0, text
    report = json_of(text)
    assert report["written_bytes"] == plan["written_bytes"] == sum(r["written_bytes"] for r in reports.values())
    assert report["source_bytes"] == sum(r["source_bytes"] for r in reports.values()) and report["part"] is None
    code, text = run("merge", tmp_path / "out", *parts)
    assert code == 0 and "already holds this conversion" in text
    assert run("convert", source, tmp_path / "out", *options)[1].count("already holds this conversion") == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--blocks", "2:4"], "--blocks 2:4: names no blocks of this model, which are 0:3"),
        (["--blocks", "2:2"], "--blocks 2:2: names no blocks"),
        (["--blocks", "3:"], "--blocks 3:3: names no blocks"),
        (["--blocks", "1-2"], "'1-2' are no blocks; write 42:84"),
        (["--blocks", "0:1", "--method", "auto"], "--method auto spends one budget on the blocks of the whole model"),
    ],
)
def test_blocks_that_make_no_part(make_checkpoint, tmp_path, calibration_text, options, says):
    if "auto" in options:
        options = [*options, "--calibration", calibration_text]
    for dry in ([], ["--dry-run"]):
        code, text = run(
            "convert", make_checkpoint() if not dry else tmp_path / "source", tmp_path / "out", *options, *dry
        )
        text = " ".join(text.replace("│", " ").split())
        assert code == 2 and says in text, text
        assert not list(tmp_path.glob("out*"))


def test_a_summary_says_what_comes_next(make_checkpoint, tmp_path):
    code, text = run("convert", make_checkpoint(), tmp_path / "a", "--method", "rtn", "--blocks", "1:3")
    text = " ".join(text.split())
    assert code == 0 and "This is a part, blocks 1:3 of 3" in text and f"bismooth merge DST {tmp_path}/a" in text
    assert "vllm serve" not in text
