"""The place to write to: what could not be taken in the end is refused at the start, with a remedy that works."""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import run
from tests.support.conversion import convert
from tests.support.damage import edit_json
from tests.support.sweep import sweep
from vllm_w8a8_bismooth.checkpoint.files import free_space
from vllm_w8a8_bismooth.conversion import destination
from vllm_w8a8_bismooth.conversion.merge import merge
from vllm_w8a8_bismooth.conversion.merge import prepare as prepare_merge
from vllm_w8a8_bismooth.recipe import Recipe

RTN = ("--method", "rtn")
WAYS = [("--dry-run",), (), ("--blocks", "0:1")]


def proposal(message: str) -> Path:
    """The folder that a message proposes, as a shell reads it."""
    found = re.search(r"like ((?:'[^']*'|[^\s';]|\\.|\"[^\"]*\")+)", message)
    assert found, message
    (word,) = shlex.split(found[1])
    return Path(word)


def assert_refused_with_a_way_out(source: Path, place: object, *parts: str) -> Path:
    """Dry, whole and as a part; what is proposed then works."""
    for way in WAYS:
        code, message = run("convert", source, place, *RTN, *way)
        assert code == 2 and all(part in message for part in parts), message
    code, text = run("convert", source, proposal(message), *RTN)
    assert code == 0, text
    return proposal(message)


@pytest.fixture
def mounted(monkeypatch):
    """``mounted(path)``: the system says that a disk is mounted there, and renaming is refused as the kernel does."""
    known: set[str] = set()
    replace = os.replace

    def refuse(old, new):
        if {os.path.realpath(old), os.path.realpath(new)} & known:
            raise OSError(16, "Device or resource busy")
        replace(old, new)

    monkeypatch.setattr(destination, "mounts", lambda: known)
    monkeypatch.setattr(os, "replace", refuse)
    return lambda path: known.add(os.path.realpath(path))


@pytest.mark.parametrize("state", ["empty", "lost+found", "by a link", "with a slash"])
def test_a_mounted_disk(make_checkpoint, tmp_path, mounted, state):
    source, volume = make_checkpoint(), tmp_path / "volume of mine"
    volume.mkdir()
    mounted(volume)
    place: object = volume
    if state == "lost+found":
        (volume / "lost+found").mkdir()
    elif state == "by a link":
        place = tmp_path / "link"
        place.symlink_to(volume)
    elif state == "with a slash":
        place = f"{volume}/"
    written = assert_refused_with_a_way_out(source, place, "a disk is mounted there", "choose a folder inside it")
    assert written == Path(place) / "source-int8" and (volume / "source-int8" / "config.json").exists()
    assert {p.name for p in tmp_path.iterdir()} <= {"source", "volume of mine", "link"}


def test_a_mounted_disk_that_holds_the_result(make_checkpoint, tmp_path, mounted):
    """In a container the result may be mounted itself."""
    source, out = make_checkpoint(), tmp_path / "out"
    assert run("convert", source, out, *RTN)[0] == 0
    mounted(out)
    code, text = run("convert", source, out, *RTN)
    assert code == 0 and "already holds this conversion" in text
    code, text = run("convert", source, out)
    assert code == 2 and "holds another conversion" in text and "choose a folder inside it" in text
    assert run("convert", source, proposal(text))[0] == 0


def test_a_mounted_disk_in_the_place_of_the_partial_folder(make_checkpoint, tmp_path, mounted):
    source = make_checkpoint()
    (tmp_path / "out.partial").mkdir()
    mounted(tmp_path / "out.partial")
    code, message = run("convert", source, tmp_path / "out", *RTN)
    assert code == 2 and "out.partial: is a link or a mounted disk" in message


def test_merging_into_a_mounted_disk(make_checkpoint, tmp_path, mounted):
    source, volume = make_checkpoint(), tmp_path / "volume"
    parts = [tmp_path / "a", tmp_path / "b"]
    for part, blocks in zip(parts, (slice(0, 2), slice(2, 3)), strict=True):
        convert(source, part, Recipe.of("rtn"), blocks=blocks)
    volume.mkdir()
    mounted(volume)
    for way in (("--dry-run",), ()):
        code, message = run("merge", volume, *parts, *way)
        assert code == 2 and "a disk is mounted there" in message
    assert proposal(message) == volume / "source-int8"
    assert merge(prepare_merge(parts, proposal(message))).files


def test_names_of_mounts(tmp_path, monkeypatch):
    """The system writes white space and backslashes as octal numbers, and no other separators of lines."""
    (tmp_path / "mounts").write_text(
        "22 27 0:21 / /proc rw - proc proc rw\n29 1 0:9 / /a\\040b\\134c\x0c\u2028 rw - x x rw\n"
    )
    monkeypatch.setattr(destination, "_MOUNTS", tmp_path / "mounts")
    assert destination.mounts() == {"/proc", "/a b\\c\x0c\u2028"}
    monkeypatch.setattr(destination, "_MOUNTS", tmp_path / "nowhere")
    assert destination.mounts() == set()


def in_a_namespace(*lines: str) -> subprocess.CompletedProcess:
    """Run a script with mounts of its own."""
    script = "\n".join(("set -e", *lines))
    return subprocess.run(["unshare", "-m", "bash", "-c", script], capture_output=True, text=True)


def can_mount() -> bool:
    return bool(shutil.which("unshare")) and in_a_namespace("mount -t tmpfs none /mnt").returncode == 0


@pytest.mark.skipif(not can_mount(), reason="mounting is not allowed here")
@pytest.mark.parametrize("kind", sweep(["a folder of the same disk", "a disk"]))
def test_a_real_mount(make_checkpoint, tmp_path, kind):
    """A folder that is mounted elsewhere on its own disk has the same device number as the folder around it."""
    source, volume, folder = make_checkpoint(), tmp_path / "vo\\lu me", tmp_path / "folder"
    volume.mkdir()
    folder.mkdir()
    mount = {"a disk": "mount -t tmpfs none", "a folder of the same disk": f"mount --bind {folder}"}[kind]
    bismooth = f"{sys.executable} -m vllm_w8a8_bismooth convert {source}"
    place = shlex.quote(str(volume))
    done = in_a_namespace(
        f"{mount} {place}",
        f"! {bismooth} {place} --method rtn",
        f"{bismooth} {place}/source-int8 --method rtn",
        f"ls {place}/source-int8/config.json",
    )
    assert done.returncode == 0 and "a disk is mounted there" in done.stderr, done.stderr
    assert f"like {shlex.quote(str(volume / 'source-int8'))}" in done.stderr


@pytest.mark.skipif(not can_mount(), reason="mounting is not allowed here")
def test_a_disk_that_is_mounted_read_only(make_checkpoint, tmp_path):
    source, volume = make_checkpoint(), tmp_path / "volume"
    volume.mkdir()
    bismooth = f"{sys.executable} -m vllm_w8a8_bismooth convert {source}"
    done = in_a_namespace(
        f"mount -t tmpfs -o ro none {volume}",
        f"! {bismooth} {volume}/out --method rtn",
    )
    assert done.returncode == 0 and "is mounted read-only); choose a folder on another disk" in done.stderr


@pytest.mark.parametrize("place", [".", "..", "here by a link", "./", "../work"])
def test_the_current_folder_and_those_around_it(make_checkpoint, tmp_path, monkeypatch, place):
    source, work = make_checkpoint(), tmp_path / "around" / "work"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    if place == "here by a link":
        (tmp_path / "link").symlink_to(work)
        place = str(tmp_path / "link")
    written = assert_refused_with_a_way_out(source, place, "is the current folder, or around it")
    assert written == Path(place) / "source-int8" and work.is_dir()


@pytest.mark.parametrize("place", ["", ".", "extra", "out"])
def test_the_source_and_what_is_in_it(make_checkpoint, tmp_path, monkeypatch, place):
    source = make_checkpoint()
    before = sorted(source.rglob("*"))
    written = assert_refused_with_a_way_out(source, source / place, "overlaps the source", "beside it")
    assert written == tmp_path / "source-int8" and sorted(source.rglob("*")) == before
    monkeypatch.chdir(source)
    shutil.rmtree(written)
    assert assert_refused_with_a_way_out(Path(), "out", "overlaps the source") == written
    code, text = run("inspect", ".")
    (line,) = [line for line in text.splitlines() if line.startswith("Next: ")]
    shutil.rmtree(written)
    assert run(*shlex.split(line)[2:])[0] == 0, line


def test_around_the_source(make_checkpoint, tmp_path):
    source = make_checkpoint()
    assert assert_refused_with_a_way_out(source, tmp_path, "overlaps the source") == tmp_path / "source-int8"


def test_a_folder_of_ones_own_in_one_that_is_not(make_checkpoint, tmp_path, monkeypatch):
    source, mine = make_checkpoint(), tmp_path / "theirs" / "mine"
    mine.mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != mine.parent and access(path, mode))
    written = assert_refused_with_a_way_out(source, mine, "theirs cannot be written", "choose a folder inside it")
    assert written == mine / "source-int8"
    code, message = run("convert", source, mine.parent / "other", *RTN)
    assert code == 2 and "no permission in" in message


def test_links(make_checkpoint, tmp_path):
    """They are followed, also when they lead nowhere yet; the room is that of the disk where they lead."""
    source = make_checkpoint()
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    for name, target in {"dangling": "disk/new", "empty": "disk/empty"}.items():
        (tmp_path / name).symlink_to(target)
        assert run("convert", source, tmp_path / name, *RTN)[0] == 0
        assert (tmp_path / name).is_symlink() and (tmp_path / target / "config.json").exists()
    assert {p.name for p in (tmp_path / "disk").iterdir()} == {"new", "empty"}
    (tmp_path / "out.partial").symlink_to("disk")
    code, message = run("convert", source, tmp_path / "out", *RTN)
    assert code == 2 and "out.partial: is a link" in message and "remove it" in message


def test_room_is_that_of_the_disk_where_a_link_leads(make_checkpoint, tmp_path, monkeypatch):
    source, asked = make_checkpoint(), []
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "deep" / "out")
    monkeypatch.setattr("shutil.disk_usage", lambda path: asked.append(path) or shutil._ntuple_diskusage(0, 0, 10**12))
    assert run("convert", source, tmp_path / "out", *RTN, "--dry-run")[0] == 0
    assert set(asked) == {tmp_path / "disk"} and free_space(tmp_path) == 10**12


NAMES = {
    "empty": ("", ["its name is empty", "give a folder, like source-int8"]),
    "a new line": ("a\nb", ["'a\\nb'", "control character", "choose a name without"]),
    "an escape": ("\x1b[31mred", ["control character"]),
    "a NUL": ("a\0b", ["control character"]),
    "no text": ("a\udcffb", ["control character, or bytes that are no text"]),
    "home": ("~/out", ["only where a shell", os.path.expanduser("~/out"), "if it is really called so"]),
    "home alone": ("~", ["only where a shell", os.path.expanduser("~")]),
    "an address": ("s3://bucket/out", ["an address, not a folder", "like source-int8"]),
    "of a folder that grows": ("deep/out.partial/", ["the name of a conversion that is not finished", "give deep/out"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_that_are_refused(make_checkpoint, tmp_path, monkeypatch, case):
    source, (name, parts) = make_checkpoint(), NAMES[case]
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for way in WAYS:
        code, message = run("convert", source, name, *RTN, *way)
        assert code == 2 and all(part in message for part in parts), message
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("name", ["-out", "--json", "it's mine", "a [b] :bear: $HOME `c`", "ünïcode", "~nobody-at-all"])
def test_names_that_are_odd(make_checkpoint, tmp_path, monkeypatch, name):
    """What is printed in the end works in a shell."""
    source = make_checkpoint()
    monkeypatch.chdir(tmp_path)
    code, text = run("convert", "--method", "rtn", "--", source, name)
    assert code == 0 and (tmp_path / name / "config.json").exists(), text
    _, line = text.split("Next: bismooth verify ")
    words = line.splitlines()[0]
    listed = subprocess.run(["bash", "-c", f"ls -- {words}"], capture_output=True, text=True)
    assert "config.json" in listed.stdout.split() and not words.startswith("-"), text
    assert f"vllm serve {words}\n" in text


@pytest.mark.parametrize("kind", ["folder", "file", "with a recipe.json of somebody", "beside what is not ours"])
def test_what_is_not_ours_stays(make_checkpoint, tmp_path, kind):
    """The folder for all models is a usual thing to name; what is proposed then works."""
    source, place = make_checkpoint(), tmp_path / "my models"
    if kind == "file":
        place.write_text("mine")
    else:
        folder = tmp_path / "my models.partial" if kind == "beside what is not ours" else place
        folder.mkdir()
        (folder / "recipe.json").write_text('{"name": "cake"}')
        (folder / ("recipe.json" if kind.startswith("with") else "thesis.tex")).write_text('{"name": "cake"}')
    for way in WAYS:
        code, message = run("convert", source, place, *RTN, *way)
        assert code == 2 and "remove" not in message and "choose a" in message, message
    if place.is_dir():
        assert "exists and is no result of bismooth" in message
        assert run("convert", source, proposal(message), *RTN)[0] == 0 and (place / "source-int8").is_dir()


FILES = {
    "config": "config.json",
    "another config": "config.json",
    "no tokenizer": "tokenizer.json",
    "no tokenizer of a part": "source/source/tokenizer.json",
    "report": "report.json",
}
BROKEN = ["shard", "no shard", "config", "another config", "no tokenizer", "report", "part", "no tokenizer of a part"]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_damaged_result_is_not_called_done(make_checkpoint, tmp_path, broken):
    """``verify`` says to convert again: that must not find everything in order."""
    source, out = make_checkpoint(), tmp_path / "out"
    options = (*RTN, "--blocks", "0:2") if broken.endswith("part") else RTN
    assert run("convert", source, out, *options)[0] == 0
    file = FILES.get(broken) or min(out.glob("*.safetensors")).name
    if broken.startswith("no "):
        (out / file).unlink()
    elif broken == "another config":
        (out / file).write_text('{"a": 1}')
    else:
        (out / file).write_bytes((out / file).read_bytes()[:-3])
    for way in ((), ("--dry-run",)):
        code, message = run("convert", source, out, *options, *way)
        assert code == 2 and f"holds this conversion, but {file} is absent or damaged; remove it" in message, message
    shutil.rmtree(out)
    assert run("convert", source, out, *options)[0] == 0
    assert "nothing to do" in run("convert", source, out, *options)[1]


def edit_config(key: str, value: object):
    return lambda out: edit_json(out / "config.json", lambda config: config.update({key: value}))


OTHERWISE = {
    "no quantization": edit_config("quantization_config", None),
    "quantization of somebody": edit_config("quantization_config", {"quant_method": "fp8"}),
    "another value": edit_config("rope_theta", 5.0),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_a_config_that_is_not_ours_is_damaged(make_checkpoint, tmp_path, case):
    source, out = make_checkpoint(num_hidden_layers=1), tmp_path / "out"
    assert run("convert", source, out, *RTN)[0] == 0
    OTHERWISE[case](out)
    code, message = run("convert", source, out, *RTN)
    assert code == 2 and "but config.json is absent or damaged; remove it" in message, message


def test_a_report_that_says_too_little_is_refused(make_checkpoint, tmp_path):
    source, out = make_checkpoint(num_hidden_layers=1), tmp_path / "out"
    assert run("convert", source, out, *RTN)[0] == 0
    edit_json(out / "report.json", lambda report: report.pop("linears"))
    for way in ((), ("--dry-run",)):
        code, message = run("convert", source, out, *RTN, *way)
        assert code == 2 and "report.json: not as it was written; remove the folder" in message, message


def test_what_lies_in_the_hubs_cache(make_checkpoint, tmp_path, monkeypatch):
    """Whoever clears the cache would take the result with it."""
    entry = tmp_path / "hub" / "models--org--tiny"
    snapshot = entry / "snapshots" / ("a" * 40)
    shutil.copytree(make_checkpoint(), snapshot)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for place in (entry.parent, entry, entry / "out", snapshot.parent / "out", snapshot, snapshot / "out"):
        code, message = run("convert", snapshot, place, *RTN)
        assert code == 2 and "overlaps the source" in message and "choose a destination outside the Hub's" in message
        assert proposal(message) == tmp_path / "work" / "tiny-int8"
    monkeypatch.chdir(snapshot)
    assert proposal(run("convert", snapshot, "out", *RTN)[1]) == Path.home() / "tiny-int8"


def test_what_leads_through_a_folder_that_does_not_exist(make_checkpoint, tmp_path, monkeypatch):
    """``absent/../out`` cannot be opened under that name: it is written, and called, by its own."""
    monkeypatch.chdir(tmp_path)
    code, text = run("convert", make_checkpoint(), "absent/../out", *RTN)
    assert code == 0 and f"bismooth verify {tmp_path / 'out'}\n" in text, text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("place", ["ln", "to ln", "ln/deep"])
def test_links_that_lead_through_a_folder_that_does_not_exist(make_checkpoint, tmp_path, monkeypatch, place):
    """What is written where they lead cannot be opened through them, and is called by its own name."""
    monkeypatch.chdir(tmp_path)
    Path("ln").symlink_to("gone/../land")
    Path("to ln").symlink_to("ln")
    source, out = make_checkpoint(num_hidden_layers=1), tmp_path / "land" / Path(*Path(place).parts[1:])
    code, text = run("convert", source, place, *RTN)
    assert code == 0 and f"bismooth verify {out}\n" in text and (out / "config.json").exists(), text
    code, text = run("convert", source, place, *RTN, "--json")
    assert code == 0 and f'"destination": "{out}"' in text


def test_an_empty_folder_says_who_may_read_the_result(make_checkpoint, tmp_path):
    source = make_checkpoint()
    for mode in (0o700, 0o2770):
        out = tmp_path / f"{mode:o}"
        out.mkdir()
        out.chmod(mode)
        assert run("convert", source, out, *RTN)[0] == 0
        assert stat.S_IMODE(out.stat().st_mode) == mode


@pytest.mark.parametrize("name", [".partial", "..partial", "inner/.partial"])
def test_a_name_of_nothing_but_partial(make_checkpoint, tmp_path, monkeypatch, name):
    make_checkpoint()
    monkeypatch.chdir(tmp_path)
    code, message = run("convert", "source", name, "--method", "rtn")
    assert code == 2 and "the name of a conversion that is not finished; give " in message
    assert run("convert", "source", message.rpartition("give ")[2].strip(), "--method", "rtn")[0] == 0


def test_inside_a_conversion_that_is_not_finished(make_checkpoint, tmp_path):
    """Which takes everything in it with it when it fails, or passes it off as a part of its result."""
    source = make_checkpoint()
    (tmp_path / "half.partial" / ".bismooth").mkdir(parents=True)
    code, message = run("convert", source, tmp_path / "half.partial" / "inner" / "out", "--method", "rtn")
    assert code == 2 and f"lies in {tmp_path / 'half.partial'}, which an unfinished conversion fills" in message
    assert run("convert", source, message.rpartition("give ")[2].strip(), "--method", "rtn")[0] == 0
