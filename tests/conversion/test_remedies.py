"""Every remedy of a refusal is followed to the letter, and ends well.

:data:`REMEDIES` is the table: words of a remedy -> what a user does who reads them. A refusal whose remedy is not in it
fails, so a new message needs a line here.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.command import json_of, run
from tests.support.contents import tensors_of
from tests.support.damage import CASES, INDEX, Q, edit_json, edit_shard
from tests.support.options import OPTIONS
from tests.support.rename import bare, edit_tensors, in_files, renamed
from vllm_w8a8_bismooth.verification import verify

Follow = Callable[[Path, Path, re.Match, str], None]
"""(source, a whole copy of it, the remedy's words, where the problem is) -> none."""


def download(source: Path, whole: Path, *_) -> None:
    shutil.rmtree(source)
    shutil.copytree(whole, source)


def mend(source: Path, whole: Path, found: re.Match, where: str) -> None:
    """The file that is named, or config.json, as it was."""
    file = Path(where).name if (whole / Path(where).name).is_file() else "config.json"
    path = source / file
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    shutil.copy(whole / file, path)


def remove(source: Path, whole: Path, found: re.Match, where: str) -> None:
    """A tensor, those that a pattern names, or a file."""
    if (source / Path(where).name).is_symlink():
        (source / Path(where).name).unlink()
        return
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    pattern = re.escape(where).replace(r"\*", ".*")
    for name in [name for name in weight_map if re.fullmatch(pattern, name)]:
        edit_shard(source, lambda tensors, name=name: tensors.pop(name), name)
        edit_json(source / INDEX, lambda index, name=name: index["weight_map"].pop(name))


def setting(source: Path, whole: Path, found: re.Match, where: str) -> None:
    edit_json(source / "config.json", lambda config: config.update({found[1]: json.loads(found[2])}))


def drop_key(source: Path, whole: Path, found: re.Match, where: str) -> None:
    edit_json(source / "config.json", lambda config: config.pop(found[1]))


def rename(source: Path, whole: Path, found: re.Match, where: str) -> None:
    (source / Path(where).name).rename(source / f"my_{Path(where).name}")


def save_again(source: Path, whole: Path, *_) -> None:
    """Opens what transformers can open, and saves it as the remedy says. What it does not find it makes up."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    for path in [*source.glob("*.safetensors"), *source.glob("*.bin")]:
        path.unlink()
    model.to(torch.bfloat16).save_pretrained(source)
    before, after = tensors_of(whole), tensors_of(source)
    assert before.keys() == after.keys() and all(torch.equal(after[name], t) for name, t in before.items())


def rename_tensor(source: Path, whole: Path, found: re.Match, where: str) -> None:
    renamed(source, lambda name: found[2] if name == found[1] else name)


def leave_one(source: Path, whole: Path, found: re.Match, where: str) -> None:
    for path in source.glob("other*.safetensors"):
        path.unlink()


def write_index(source: Path, whole: Path, *_) -> None:
    """Says of all files which tensors they hold."""
    weight_map = {name: path.name for path in source.glob("*.safetensors") for name in load_file(path)}
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def rename_file(source: Path, whole: Path, found: re.Match, where: str) -> None:
    (source / found[1]).rename(source / found[2])


def move_out(source: Path, whole: Path, found: re.Match, where: str) -> None:
    (source / found[1]).rename(source.parent / found[1])


REMEDIES: dict[str, Follow] = {
    r"^write model.safetensors.index.json, which says|^name in model.safetensors.index.json": write_index,
    r"rename (.+\.safetensors) to (\S+\.safetensors)": rename_file,
    r"move (.+) out of the folder": move_out,
    r"set (num_hidden_layers) to (\d+) in config.json": setting,
    r"set (architectures) to (\[.*?\]) in config.json": setting,
    r"remove (quantization_config) from config.json": drop_key,
    r"rename (\S+) to (\S+) in the files": rename_tensor,
    r"give the (?:folder|checkpoint as)|convert the original|give a checkpoint in|repair": download,
    r"download .*again|^mend the one": download,  # git lfs pull does the same
    r"put the checkpoint's \S+ there": download,
    r"model\.(?:to\(.*\)\.)?save_pretrained\(FOLDER\)": save_again,
    r"leave only the files of one": leave_one,
    r"rename it": rename,
    r"remove the tensor only if|remove the link": remove,
    r"mend|check the path|remove one of the keys": mend,
}


def follow(message: str, source: Path, whole: Path) -> None:
    """Does what each line of a refusal says."""
    lines = message.splitlines()
    if "bismooth inspect lists them" in lines[-1]:
        lines = json_of(run("inspect", source, "--json")[1])["problems"]
    for line in lines:
        problem, _, remedy = line.strip().removeprefix("also: ").rpartition("; ")
        where = problem.removeprefix(f"{source}: ").partition(": ")[0]
        assert remedy, line
        action = next(((f, m) for words, f in REMEDIES.items() if (m := re.search(words, remedy))), None)
        assert action, f"no line of the table is about the remedy {remedy!r}"
        action[0](source, whole, action[1], where)


def try_remedy(source: Path, whole: Path, out: Path, *options) -> None:
    code, message = run("convert", source, out, *options)
    assert code == 2, message
    follow(message, source, whole)
    code, message = run("convert", source, out, *options)
    assert code == 0, message
    assert verify(out, source, engine=False).ok


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_source(make_checkpoint, tmp_path, case):
    source = make_checkpoint()
    whole = shutil.copytree(source, tmp_path / "whole")
    CASES[case][0](source)
    try_remedy(source, whole, tmp_path / "out", "--method", "rtn")


def fp64(source: Path) -> None:
    edit_tensors(source, lambda tensors: tensors | {Q: tensors[Q].double()})


def headless(source: Path) -> None:
    renamed(source, bare)


def head_of_another_name(source: Path) -> None:
    renamed(source, lambda name: name.replace("lm_head", "output"))


def classifier(source: Path) -> None:
    renamed(source, lambda name: None if name.startswith("lm_head") else name)
    edit_tensors(source, lambda tensors: tensors | {"score.weight": torch.randn(2, 64)})


def pruned(source: Path) -> None:
    renamed(source, lambda name: name.replace("up_proj.weight", "up_proj.weight_orig"))


def two_models(source: Path) -> None:
    in_files(source, ["model-00001-of-00001.safetensors"])
    shutil.copy(source / "model-00001-of-00001.safetensors", source / "other.safetensors")


def head_in_a_file_of_its_own(source: Path, index: bool = False) -> None:
    tensors = load_file(source / "model.safetensors")
    save_file({"lm_head.weight": tensors.pop("lm_head.weight")}, source / "lm_head.safetensors")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    if index:
        weight_map = dict.fromkeys(tensors, "model.safetensors")
        (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def head_that_the_index_lacks(source: Path) -> None:
    head_in_a_file_of_its_own(source, index=True)


def by_a_browser(source: Path) -> None:
    in_files(source, ["model-00001-of-00002.safetensors", "model-00002-of-00002 (1).safetensors"])


def twice_by_a_browser(source: Path) -> None:
    in_files(source, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    shutil.copy(source / "model-00002-of-00002.safetensors", source / "model-00002-of-00002 (1).safetensors")


def pointer(source: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    (source / "model.safetensors").write_text(text)


def pickled(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()


def packed(source: Path) -> None:
    edit_json(
        source / "config.json", lambda config: config.update(quantization_config={"quant_method": "bitsandbytes"})
    )


@pytest.mark.parametrize(
    "damage",
    [
        fp64,
        headless,
        head_of_another_name,
        head_in_a_file_of_its_own,
        head_that_the_index_lacks,
        classifier,
        pruned,
        two_models,
        by_a_browser,
        twice_by_a_browser,
        pointer,
        pickled,
        packed,
    ],
)
def test_an_odd_source(make_checkpoint, tmp_path, damage):
    source = make_checkpoint(sharded=False)
    whole = shutil.copytree(source, tmp_path / "whole")
    damage(source)
    try_remedy(source, whole, tmp_path / "out", "--method", "rtn")


Change = Callable[[list[str], re.Match, str, Path], list[str]]
"""(options, the remedy's words, the line, a text file) -> the options as the remedy wants them."""


def named(line: str) -> str:
    """The option that a refusal is about: what has no effect, or what stands first."""
    found = re.search(r"(--[a-z-]+) has no effect", line) or re.search(r"(--[a-z-]+)", line)
    assert found, line
    return found[1]


def without(options: list[str], option: str) -> list[str]:
    at = options.index(option)
    return options[:at] + options[at + 2 :]


def leave_out(options: list[str], found: re.Match, line: str, text: Path) -> list[str]:
    return without(options, named(line))


def give(options: list[str], found: re.Match, line: str, text: Path) -> list[str]:
    """The value that the remedy names, for the option at fault."""
    option = "--group-size" if "would fit" in found[0] else named(line)
    kept = without(options, option) if option in options else options
    return [*kept, option, found[1]]


def another_pattern(options: list[str], found: re.Match, line: str, text: Path) -> list[str]:
    """A sound pattern for fewer linears, in place of all that were given."""
    option = re.findall(r"(--ignore|--group-layers)", line)[-1]
    while option in options:
        options = without(options, option)
    return [*options, option, r"layers\.1\.self_attn\.o_proj"]


def the_other_one(options: list[str], found: re.Match, line: str, text: Path) -> list[str]:
    return [*options, "--group-size", "32"]


def calibrated_by_default(options: list[str], found: re.Match, line: str, text: Path) -> list[str]:
    return without(options, "--calibration")


CHANGES: dict[str, Change] = {
    r"(\d+)(?:, \d+)* would fit": give,
    r"choose one of (\w+)": give,
    r"give a file, (bundled) or none": give,
    r"(?:give|write) (?:a share|one|15|nats)\D*(\d[\d.]*%?)": give,
    r"linears are called like|mend it|let it name fewer|leave it out of one|leave that one out": another_pattern,
    r"give the other one too": the_other_one,
    r"leave out --calibration none": calibrated_by_default,
    r"leave it out|leave out one of the two": leave_out,
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(make_checkpoint, tmp_path, calibration_text, case):
    """Until nothing is refused any more: a remedy may lead to the next sentence, but not in a circle."""
    source, options, seen = make_checkpoint(), list(OPTIONS[case][0]), set()
    while True:
        code, message = run("convert", source, tmp_path / "out", *options)
        if code == 0:
            break
        line = message.strip().splitlines()[-1]
        assert line not in seen, "the remedy changed nothing"
        seen.add(line)
        change = next(((f, m) for words, f in CHANGES.items() if (m := re.search(words, line))), None)
        assert change, f"no line of the table is about {line!r}"
        options = change[0](options, change[1], line, calibration_text)
    assert seen and len(seen) <= 3
