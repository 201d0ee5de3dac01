"""Checkpoints to the Hub, with huggingface_hub's own client against a server on this machine."""

import json
import shutil
import subprocess
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from tests.support.contents import digests
from tests.support.conversion import convert
from tests.support.damage import edit_json
from tests.support.hub import TOKEN, serving
from tests.support.hub_client import command, python
from tests.support.models import tiny_model, write_checkpoint
from vllm_w8a8_bismooth.checkpoint.upload import Target
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.report.labels import Labels
from vllm_w8a8_bismooth.verification import verify


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("upload") / "tiny", tiny_model("llama"))


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory) -> Path:
    """A conversion in several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_w8a8_bismooth.checkpoint.writer.SHARD_SIZE", "40KB")
        folder = tmp_path_factory.mktemp("converted") / "out"
        convert(source, folder, Recipe.of("rtn"), labels=Labels("org/tiny", "mit"))
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def hub(tmp_path):
    with serving({}, tmp_path / "storage") as server:
        yield server


@pytest.fixture
def bismooth(hub, tmp_path, monkeypatch):
    def run(*arguments, token: str | None = TOKEN) -> subprocess.CompletedProcess:
        return command(monkeypatch, tmp_path, hub.endpoint, token, *arguments)

    return run


def shards(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(folder).items() if name.endswith(".safetensors")}


def sent_twice(hub) -> int:
    """Bytes of large files that arrived more than once."""
    return sum(count - hub.blob(digest).stat().st_size for digest, count in hub.received.items())


def test_what_was_pushed_is_what_is_downloaded(hub, bismooth, converted, source, tmp_path):
    before = digests(converted)
    words = ("vllm_w8a8_bismooth", "push", converted, "org/out", "--json")
    done = python(tmp_path, hub.endpoint, *words, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["url"] == f"{hub.endpoint}/org/out" and said["commit"] == hub.head("org/out") and not said["public"]
    assert f"{said['files']} files, " in done.stderr and f"are at {said['url']} (private)." in done.stderr
    assert "org/out" in hub.private and len(hub.commits["org/out"]) == 2 and sent_twice(hub) == 0
    there = digests(hub.repositories["org/out"])
    assert there.keys() == before.keys() | {".gitattributes"} and digests(converted) == before
    assert {name for name in before if there[name] != before[name]} == {"README.md"}
    card = (hub.repositories["org/out"] / "README.md").read_text()
    assert "\nvllm serve org/out\n" in card and "PATH_TO_THIS_FOLDER --runner" not in card
    assert "\nhf download org/out --local-dir PATH_TO_THIS_FOLDER\nbismooth verify PATH_TO_THIS_FOLDER\n" in card
    download = "import sys, huggingface_hub as hub; hub.snapshot_download(sys.argv[1], local_dir=sys.argv[2])"
    (tmp_path / "here" / "download.py").write_text(download)
    fetched = python(tmp_path, hub.endpoint, "download", "org/out", tmp_path / "fetched", HF_TOKEN=TOKEN)
    assert fetched.returncode == 0, fetched.stderr
    found = {name: digest for name, digest in digests(tmp_path / "fetched").items() if not name.startswith(".")}
    assert found == {name: digest for name, digest in there.items() if not name.startswith(".")}
    assert verify(tmp_path / "fetched", source, engine=False).ok
    received = hub.received.total()
    again = bismooth("push", converted, "org/out", "--json")
    assert again.returncode == 0 and json.loads(again.stdout) == said, again.stderr
    assert hub.received.total() == received and len(hub.commits["org/out"]) == 2


def test_nothing_hidden_or_strange_goes_up(hub, bismooth, converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "out")
    (folder / ".bismooth").mkdir()
    for name in (".bismooth/run.json", ".secret", "a.partial", "b.tmp"):
        (folder / name).write_text("not for others")
    (folder / "notes.txt").write_text("mine")
    (folder / "[b]keys").symlink_to("/etc/passwd")
    done = bismooth("push", folder, "org/out")
    assert done.returncode == 0 and "Left here, as no part of a checkpoint: [b]keys, notes.txt." in done.stderr
    assert digests(hub.repositories["org/out"]).keys() == digests(converted).keys() | {".gitattributes"}


def test_weights_of_modules_in_their_own_folders_go_with_it(hub, bismooth, converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "out")
    (folder / "2_Dense").mkdir()
    dense = folder / "2_Dense" / "model.safetensors"
    save_file({"linear.weight": torch.ones(8, 64)}, dense)
    (folder / "2_Dense" / "config.json").write_text('{"in_features": 64, "out_features": 8, "bias": false}')
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]')
    for _ in range(2):
        assert bismooth("push", folder, "org/out").returncode == 0
    assert (hub.repositories["org/out"] / "2_Dense" / "model.safetensors").read_bytes() == dense.read_bytes()


def test_an_upload_that_was_cut_off_goes_on(hub, bismooth, converted):
    hub.full = 2
    done = bismooth("push", converted, "org/out")
    assert done.returncode == 2 and "the Hub refuses (status 403" in done.stderr and "Traceback" not in done.stderr
    assert len(hub.commits["org/out"]) == 1 and digests(hub.repositories["org/out"]).keys() == {".gitattributes"}
    assert len(hub.received) == 2
    hub.full = None
    done = bismooth("push", converted, "org/out")
    assert done.returncode == 0, done.stderr
    assert shards(hub.repositories["org/out"]) == shards(converted) and sent_twice(hub) == 0


def test_a_lost_connection_costs_the_shard_that_was_on_its_way(hub, bismooth, converted):
    hub.drops = 20_000
    done = bismooth("push", converted, "org/out")
    assert done.returncode == 0, done.stderr
    assert shards(hub.repositories["org/out"]) == shards(converted) and 0 < sent_twice(hub) < 60_000


def test_convert_and_push_is_one_command(hub, bismooth, source, tmp_path):
    options = ("--method", "rtn", "--license", "mit", "--push-to-hub", "me/out", "--public")
    planned = bismooth("convert", source, tmp_path / "out", *options, "--dry-run")
    assert planned.returncode == 0 and not hub.repositories, planned.stderr
    assert "Then it is uploaded to me/out (everybody may read it)" in planned.stdout
    done = bismooth("convert", source, tmp_path / "out", *options, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["push"]["hub_id"] == "me/out" and said["push"]["public"] and len(said["linears"]) == 21
    assert "me/out" not in hub.private and "license: mit" in (hub.repositories["me/out"] / "README.md").read_text()
    assert "The card names no base model" in done.stderr
    assert shards(hub.repositories["me/out"]) == shards(tmp_path / "out")
    again = bismooth("convert", source, tmp_path / "out", *options)
    assert again.returncode == 0 and "already holds this conversion" in again.stderr, again.stderr
    assert len(hub.commits["me/out"]) == 2 and sent_twice(hub) == 0


def test_a_published_checkpoint_is_read_from_the_hub(hub, bismooth, converted, tmp_path):
    assert bismooth("push", converted, "org/out", "--public").returncode == 0
    done = python(tmp_path, hub.endpoint, "vllm_w8a8_bismooth", "inspect", "org/out", "--json")
    assert done.returncode == 2 and "already quantized" in done.stdout


def test_an_interrupt_says_that_it_goes_on(bismooth, converted, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_w8a8_bismooth.checkpoint.upload.upload", interrupted)
    done = bismooth("push", converted, "org/out")
    assert done.returncode == 130 and "Interrupted; the same command goes on from there" in done.stderr


def test_a_shard_that_changes_under_way_is_not_committed(hub, bismooth, converted, tmp_path, monkeypatch):
    folder = shutil.copytree(converted, tmp_path / "out")
    send = huggingface_hub.HfApi.preupload_lfs_files

    def changed(*arguments, **options):
        damaged_shard(folder)
        return send(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.HfApi, "preupload_lfs_files", changed)
        done = bismooth("push", folder, "org/out")
    assert done.returncode == 2 and "changed while it was sent" in done.stderr, done.stderr
    assert digests(hub.repositories["org/out"]).keys() == {".gitattributes"}
    shutil.copytree(converted, folder, dirs_exist_ok=True)
    assert bismooth("push", folder, "org/out").returncode == 0


def test_a_commit_of_somebody_else_is_not_overwritten(hub, bismooth, converted, monkeypatch):
    send = huggingface_hub.HfApi.create_commit

    def late(*arguments, **options):
        hub.commit("org/out")
        return send(*arguments, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", late)
    done = bismooth("push", converted, "org/out")
    assert done.returncode == 2 and "somebody changed the repository during the upload" in done.stderr, done.stderr


def test_a_repository_that_was_not_to_be_seen_is_left_alone(hub, bismooth, converted, monkeypatch):
    hub.create("org/out", private=True)
    unseen = Target("org/out", False, None, {})
    monkeypatch.setattr("vllm_w8a8_bismooth.checkpoint.upload.look", lambda *arguments: unseen)
    done = bismooth("push", converted, "org/out")
    assert done.returncode == 2 and "was not to be seen before; choose another name" in done.stderr, done.stderr
    assert digests(hub.repositories["org/out"]).keys() == {".gitattributes"} and not hub.received


def edit(hub, place: str, text: str | None) -> str:
    """Somebody's commit, which changes or removes a file of ``org/out``; its bytes, as text."""
    path = hub.repositories["org/out"] / place
    path.unlink() if text is None else path.write_text(text)
    hub.commit("org/out")
    return text or ""


def test_words_that_were_written_on_the_hub_are_not_undone(hub, bismooth, converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "out")
    push = ("push", folder, "org/out")
    assert bismooth(*push).returncode == 0
    there = hub.repositories["org/out"]
    card = edit(hub, "README.md", (there / "README.md").read_text() + "Theirs.\n")
    tokenizer = edit(hub, "tokenizer.json", '{"theirs": 1}')
    commits = len(hub.commits["org/out"])
    convert_again = ("convert", tmp_path.parent, folder, "--method", "rtn", "--push-to-hub", "org/out")
    for words in (push, convert_again):
        done = bismooth(*words)
        assert done.returncode == 2 and "undo what somebody wrote there (README.md, tokenizer.json)" in done.stderr
        fetch = f"take that over (hf download org/out README.md tokenizer.json --local-dir {folder}), or remove it"
        assert fetch in done.stderr and len(done.stderr.strip().splitlines()) == 1
    shutil.copy(there / "README.md", folder)
    edit(hub, "tokenizer.json", None)
    assert bismooth(*push).returncode == 0
    assert (there / "README.md").read_text() == card and (there / "tokenizer.json").read_text() != tokenizer
    assert len(hub.commits["org/out"]) == commits + 2
    (folder / "README.md").write_text(card + "Ours.\n")
    assert bismooth(*push).returncode == 0 and (there / "README.md").read_text().endswith("Theirs.\nOurs.\n")


def test_a_card_that_was_drawn_up_again_is_pushed(hub, bismooth, source, tmp_path):
    command = ("convert", source, tmp_path / "out", "--method", "rtn", "--push-to-hub", "org/out")
    assert bismooth(*command).returncode == 0
    edit(hub, "mine.png", "theirs")  # nothing that is sent
    assert bismooth(*command, "--license", "mit").returncode == 0
    assert "license: mit" in (hub.repositories["org/out"] / "README.md").read_text()
    assert (hub.repositories["org/out"] / "mine.png").read_text() == "theirs"


def test_a_card_in_an_empty_repository_is_overwritten_if_the_hub_wrote_it(hub, bismooth, converted, source, tmp_path):
    hub.create("org/out", private=True)
    (hub.repositories["org/out"] / "README.md").write_text("---\nlicense: mit\n---\n")
    hub.commits["org/out"].clear()
    hub.commit("org/out", "initial commit")
    card = edit(hub, "README.md", "# My words\n")
    done = bismooth("push", converted, "org/out")
    assert done.returncode == 2 and "somebody wrote there (README.md); take that over" in done.stderr
    done = bismooth("convert", source, tmp_path / "out", "--method", "rtn", "--push-to-hub", "org/out")
    assert done.returncode == 2 and "somebody wrote there (README.md); remove it there" in done.stderr
    assert not (tmp_path / "out").exists() and (hub.repositories["org/out"] / "README.md").read_text() == card
    edit(hub, "README.md", "---\nlicense: mit\n---\n")
    assert bismooth("push", converted, "org/out").returncode == 0


REFUSALS = {
    "not logged in": (None, "org/out", ["nobody is logged in", "hf auth login"]),
    "no such token": ("hf_old", "org/out", ["does not know the token", "hf auth login --force"]),
    "token only reads": ("hf_reads", "org/out", ["the token 'mine' may not write", "settings/tokens"]),
    "token writes elsewhere": ("hf_fine_reads", "org/out", ["the token 'mine' may not write"]),
    "another's name": (TOKEN, "google/out", ["no member of google", "me/..., org/..., readers/..."]),
    "reader in the organization": (TOKEN, "readers/out", ["me may only read in readers"]),
    "no name": (TOKEN, "out", ["not the name of a repository", "write org/name"]),
    "a revision": (TOKEN, "org/out@main", ["not the name of a repository", "write org/name"]),
    "name not allowed": (TOKEN, "org/a--b", ["not a name that the Hub allows"]),
    "other weights": (TOKEN, "org/other", ["holds something else", "model.safetensors", "name another repository"]),
    "other files": (TOKEN, "org/files", ["holds something else", "adapter_config.json", "name another repository"]),
    "public": (TOKEN, "org/public", ["the repository is public; give --public"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_come_before_the_conversion(hub, bismooth, converted, source, tmp_path, case):
    token, hub_id, parts = REFUSALS[case]
    for name, file in (("other", "model.safetensors"), ("files", "adapter_config.json"), ("public", "LICENSE")):
        hub.create(f"org/{name}", private=name != "public")
        (hub.repositories[f"org/{name}"] / file).write_text("theirs")
    before = {name: digests(folder) for name, folder in hub.repositories.items()}
    pushed = bismooth("push", converted, hub_id, token=token)
    both = bismooth("convert", source, tmp_path / "out", "--method", "rtn", "--push-to-hub", hub_id, token=token)
    for done in (pushed, both):
        assert done.returncode == 2 and all(part in done.stderr for part in parts), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert before == {name: digests(folder) for name, folder in hub.repositories.items()} and not hub.received


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "because HF_HUB_OFFLINE is set; unset it and run the same command again"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the connection to the Hub was lost (ConnectError"),
    ],
)
def test_without_a_connection(hub, converted, tmp_path, settings, part):
    words = ("vllm_w8a8_bismooth", "push", converted, "org/out")
    done = python(tmp_path, hub.endpoint, *words, **{"HF_TOKEN": TOKEN, **settings})
    assert done.returncode == 2 and done.stderr.startswith("Error: ") and part in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("token", ["hf_fine", "hf_one"])
def test_tokens_of_few_rights_are_enough(hub, bismooth, converted, token):
    done = bismooth("push", converted, "org/out", token=token)
    assert done.returncode == 0, done.stderr


def test_a_private_repository_does_not_become_public(hub, bismooth, converted):
    hub.create("org/out", private=True)
    done = bismooth("push", converted, "org/out", "--public")
    assert done.returncode == 2 and "is private, and --public was given; leave --public out" in done.stderr
    assert bismooth("push", converted, "org/out").returncode == 0


def test_the_hubs_word_on_the_card_is_passed_on(hub, bismooth, converted):
    hub.invalid = "a licence of ours"
    done = bismooth("push", converted, "org/out")
    assert done.returncode == 2 and "a licence of ours" in done.stderr and "mend README.md" in done.stderr
    assert not hub.repositories and not hub.received


def damaged_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")


def leave_stale_index(folder: Path) -> None:
    edit_json(folder / "model.safetensors.index.json", lambda index: index["metadata"].update(total_size=1))


WRONG = {
    "damaged": (damaged_shard, ["has SHA-256", "copy the file again"]),
    "absent": (lambda folder: sorted(folder.glob("*.safetensors"))[0].unlink(), ["absent", "copy the file again"]),
    "a stray": (lambda f: (f / "x.safetensors").write_text(""), ["no shard that report.json names", "move it out"]),
    "another format": (lambda f: (f / "pytorch_model.bin").write_text(""), ["no shard that report", "move it out"]),
    "a copied file is absent": (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer.json: is absent"]),
    "another config": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers=9)),
        ["recipe.json: layout: is not that of a model with this config.json"],
    ),
    "another's index": (leave_stale_index, ["metadata.total_size is 1"]),
    "not ours": (
        lambda folder: edit_json(folder / "config.json", lambda c: c["quantization_config"].pop("bismooth")),
        ["not written by bismooth"],
    ),
    "no report": (lambda folder: (folder / "report.json").unlink(), ["not written by bismooth"]),
    "no folder": (shutil.rmtree, ["no such folder"]),
    "not finished": (lambda folder: folder.rename(f"{folder}.partial"), ["not finished", "run the command again"]),
    "a part": (lambda folder: (folder / "part.json").write_text("{}"), ["a part of a checkpoint", "bismooth merge"]),
}


def test_a_folder_that_still_grows_is_not_finished(hub, bismooth, tmp_path):
    (tmp_path / "half.partial" / ".bismooth").mkdir(parents=True)
    done = bismooth("push", tmp_path / "half.partial", "org/out")
    assert done.returncode == 2 and "half.partial: not finished; run the command again that began it" in done.stderr


@pytest.mark.parametrize("case", WRONG)
def test_only_what_was_written_goes_up(hub, bismooth, converted, tmp_path, case):
    damage, parts = WRONG[case]
    folder = shutil.copytree(converted, tmp_path / "out")
    damage(folder)
    done = bismooth("push", folder, "org/out")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr
    assert not hub.repositories


def test_options_without_effect_are_refused(bismooth, source, tmp_path):
    for options, part in {
        ("--public",): "--public: has no effect without --push-to-hub",
        ("--push-to-hub", "org/out", "--blocks", "0:1"): "a part of a checkpoint is not uploaded",
    }.items():
        done = bismooth("convert", source, tmp_path / "out", *options)
        assert done.returncode == 2 and part in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "strange"),
    [
        ({}, None),
        ({".gitattributes": None, "README.md": None}, None),
        ({".gitattributes": None, "LICENSE": None}, "LICENSE"),
        ({"config.json": None}, "config.json"),
        ({"config.json": None, "a.safetensors": "1", "mine.png": None}, None),
        ({"a.safetensors": "2"}, "a.safetensors"),
        ({"a.safetensors": "1", "c.safetensors": "3"}, "c.safetensors"),
        ({"a.safetensors": "1", "x/model.gguf": "3"}, "x/model.gguf"),
    ],
)
def test_what_a_repository_may_hold(files, strange):
    target = Target("org/out", False, "0", files)
    if strange is None:
        target.refuse_others({"a.safetensors": "1", "b.safetensors": "2"})
    else:
        with pytest.raises(BismoothError, match=rf"something else than this checkpoint \({strange}\)"):
            target.refuse_others({"a.safetensors": "1", "b.safetensors": "2"})
