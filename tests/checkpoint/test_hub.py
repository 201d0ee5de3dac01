"""Checkpoints on the Hub, with huggingface_hub's own client against a server on this machine."""

import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from tests.support import own
from tests.support.contents import digests
from tests.support.conversion import convert
from tests.support.damage import edit_json
from tests.support.hub import COMMIT, serving
from tests.support.hub_client import python
from tests.support.models import tiny_model, write_checkpoint
from vllm_w8a8_bismooth.checkpoint.hub import parse
from vllm_w8a8_bismooth.recipe import Recipe

WEIGHTS_READ = 100_008
"""Bytes of a shard that huggingface_hub reads at most for a header of ordinary size."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A sharded checkpoint whose shards are much larger than their headers, with files that nobody needs."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    model = tiny_model("llama", vocab_size=4096, hidden_size=128).to(torch.bfloat16)
    write_checkpoint(folder, model)
    model.save_pretrained(folder, max_shard_size="1MB")
    for name in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors", "original/consolidated.00.pth"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bytes(1000))
    (folder / "README.md").write_text("A model.")
    return folder


@pytest.fixture
def hub(checkpoint, tmp_path):
    with serving({"org/tiny": checkpoint}) as server:
        yield server


@pytest.fixture
def bismooth(tmp_path):
    def run(endpoint: str, *arguments, **environment) -> subprocess.CompletedProcess:
        return python(tmp_path, endpoint, "vllm_w8a8_bismooth", *arguments, **environment)

    return run


@pytest.mark.parametrize(
    "source, parsed",
    {
        "org/name": ("org/name", None),
        "org/name@v1.0": ("org/name", "v1.0"),
        "org/name@refs/pr/1": ("org/name", "refs/pr/1"),
        "name": None,
        "name@main": None,
        "a/b/c": None,
        "a/b/c@main": None,
        "./name": None,
        "../name": None,
        "/name": None,
        "~/name": None,
        "~user/name": None,
        "name/": None,
        "org/.name": None,
        "org/name@": None,
        "": None,
    }.items(),
)
def test_what_names_a_repository(source, parsed):
    assert parse(source) == parsed


def test_folders_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("org/name") == ("org/name", None)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse("org/name") is None


def test_inspect_reads_no_weights(hub, bismooth, checkpoint):
    done = bismooth(hub.endpoint, "inspect", "org/tiny", "--json")
    assert done.returncode == 0, done.stderr
    there, here = json.loads(done.stdout), json.loads(bismooth(hub.endpoint, "inspect", checkpoint, "--json").stdout)
    assert (there["hub_id"], there["revision"]) == ("org/tiny", COMMIT) and here["hub_id"] is None
    for key in ("parameters", "dtypes", "source_bytes", "sizes", "needs", "per_group", "problems"):
        for needs in [*there["needs"].values(), *here["needs"].values()] if key == "needs" else []:
            assert needs.pop("seconds") > 0  # measured, and so never quite the same
        assert there[key] == here[key], key
    shards = {name for name in hub.served if name.endswith(".safetensors")}
    assert len(shards) > 1 and "consolidated.safetensors" not in shards
    assert all(hub.served[name] <= WEIGHTS_READ for name in shards)
    assert sum(hub.served[name] for name in shards) < there["source_bytes"] / 2
    small = {"config.json", "model.safetensors.index.json", "generation_config.json", "tokenizer_config.json"}
    assert set(hub.served) - shards == small


def test_sites_read_the_config_and_code_alone(hub, bismooth, tmp_path):
    """Code is downloaded, and runs, only if it is trusted."""
    hub.repositories["org/own"] = tmp_path / "own"
    own.write_code(tmp_path / "own")
    done = bismooth(hub.endpoint, "sites", "org/own")
    assert done.returncode == 2 and "--trust-remote-code" in done.stderr and set(hub.served) == {"config.json"}
    done = bismooth(hub.endpoint, "sites", "org/own", "--trust-remote-code", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model_type"] == "own"
    assert set(hub.served) == {"config.json", "configuration_own.py", "modeling_own.py"}


@pytest.mark.slow
def test_convert_downloads_what_it_needs(hub, bismooth, checkpoint, tmp_path):
    """The same result as from the folder; what is no part of the checkpoint is neither downloaded nor missed."""
    dry = bismooth(hub.endpoint, "convert", "org/tiny", tmp_path / "out", "--method", "rtn", "--dry-run")
    assert dry.returncode == 2 and "not downloaded yet" in dry.stderr and not hub.served
    done = bismooth(hub.endpoint, "convert", "org/tiny@main", tmp_path / "out", "--method", "rtn")
    assert done.returncode == 0, done.stderr
    assert not any(name.endswith((".bin", ".gguf", ".pth")) or "consolidated" in name for name in hub.served)
    provenance = json.loads((tmp_path / "out" / "recipe.json").read_text())["provenance"]
    assert provenance["source"] == "org/tiny" and provenance["revision"] == COMMIT
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))

    convert(checkpoint, tmp_path / "local", Recipe.of("rtn"))
    there, here = digests(tmp_path / "out"), digests(tmp_path / "local")
    assert {name for name in here.keys() | there.keys() if here.get(name) != there.get(name)} == {
        "recipe.json",
        "README.md",  # which names the base model
    }

    served = hub.served.total()
    offline = {"HF_HUB_OFFLINE": "1"}
    again = bismooth(hub.endpoint, "convert", "org/tiny", tmp_path / "out", "--method", "rtn", **offline)
    assert again.returncode == 0 and "already holds this conversion" in again.stderr, again.stderr
    dry = bismooth(hub.endpoint, "convert", "org/tiny", tmp_path / "new", "--method", "rtn", "--dry-run", **offline)
    assert dry.returncode == 0 and "model.safetensors" in dry.stdout, dry.stderr
    inspected = bismooth(hub.endpoint, "inspect", "org/tiny", "--json", **offline)
    assert inspected.returncode == 0 and json.loads(inspected.stdout)["hub_id"] == "org/tiny", inspected.stderr
    assert hub.served.total() == served


def test_what_cannot_be_converted_is_not_downloaded(hub, bismooth, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "fp8")
    edit_json(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    hub.repositories["org/fp8"] = folder
    done = bismooth(hub.endpoint, "convert", "org/fp8", tmp_path / "out")
    assert done.returncode == 2 and "all weights are float" in done.stderr and "'fp8'" in done.stderr
    assert all(hub.served[name] <= WEIGHTS_READ for name in hub.served if name.endswith(".safetensors"))


def damaged(checkpoint: Path, folder: Path) -> Path:
    """Three shards with something wrong, each in its own way."""
    shutil.copytree(checkpoint, folder)
    first, second, third = sorted(folder.glob("model-*.safetensors"))[:3]
    first.write_bytes(first.read_bytes()[:-20_000])
    second.write_bytes(b"\xff" * 7 + b"\0" + second.read_bytes()[8:])
    third.unlink()
    return folder


def test_bad_shards_are_told_together(hub, bismooth, checkpoint, tmp_path):
    folder = hub.repositories["org/bad"] = damaged(checkpoint, tmp_path / "bad")
    for source in ("org/bad", folder):
        done = bismooth(hub.endpoint, "inspect", source, "--json")
        assert done.returncode == 2, done.stderr
        problems = json.loads(done.stdout)["problems"]
        assert len(problems) == 3 and all(str(source) in problem for problem in problems), problems
        assert "truncated" in problems[0] and "corrupt" in problems[1] and "absent" in problems[2]


ERRORS = {
    "no such repository": ("org/none", ["org/none", "neither a folder here nor a repository", "hf auth login"]),
    "no such revision": ("org/tiny@v2", ["org/tiny@v2", "no revision 'v2'"]),
    "gated": ("org/gated", ["org/gated: access is restricted", "accept the licence at http", "hf auth login"]),
    "no safetensors": ("org/pickles", ["org/pickles", "only safetensors"]),
    "no config": ("org/data", ["org/data/config.json", "not in the repository"]),
    "not allowed": ("org/a--b", ["org/a--b", "check it"]),
    "looks like a path": ("./org/tiny", ["no such folder"]),
    "no name": ("tiny", ["tiny: no such folder"]),
}


@pytest.fixture(scope="module")
def refusals(checkpoint, tmp_path_factory) -> dict[str, dict]:
    """Case -> what ``bismooth inspect`` answers, all of them in one process."""
    folder = tmp_path_factory.mktemp("refusals")
    repositories = {"org/tiny": checkpoint, "org/gated": checkpoint}
    for name, kept in (("pickles", ["config.json", "pytorch_model.bin"]), ("data", ["README.md"])):
        repositories[f"org/{name}"] = folder / name
        (folder / name).mkdir()
        for file in kept:
            shutil.copy(checkpoint / file, folder / name)
    commands, answers = folder / "commands.json", folder / "answers.json"
    commands.write_text(json.dumps({case: ["inspect", source] for case, (source, _) in ERRORS.items()}))
    with serving(repositories) as hub:
        hub.gated.add("org/gated")
        done = python(folder, hub.endpoint, "tests.support.workers.commands", commands, answers)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr
    return json.loads(answers.read_text())


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_message(refusals, case):
    done, parts = refusals[case], ERRORS[case][1]
    said = done["stdout"] + done["stderr"]
    assert done["code"] == 2 and "Traceback" not in said and all(part in said for part in parts), said
    surveyed = case in ("no safetensors", "no config")  # then the rest is told as well
    assert surveyed or (done["stdout"] == "" and done["stderr"].startswith("Error: ")), said


@pytest.mark.parametrize("why", ["HF_HUB_OFFLINE", "no server"])
def test_offline_without_a_copy(bismooth, why):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    done = bismooth(endpoint, "inspect", "org/tiny", **({"HF_HUB_OFFLINE": "1"} if why == "HF_HUB_OFFLINE" else {}))
    assert done.returncode == 2 and done.stdout == "", done.stdout
    assert "no complete copy in the cache" in done.stderr and "Traceback" not in done.stderr, done.stderr
