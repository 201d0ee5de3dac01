"""Damaged and crafted checkpoints in the real engine: refused by name, and nothing in them is executed."""

import contextlib
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given

from benchmarks.score import engine_environment
from tests.support.command import patience
from tests.support.conversion import convert
from tests.support.damage import INDEX, edit_json, edit_shard, shard_of
from tests.support.models import SHARD, tiny_model, write_checkpoint
from tests.support.quantization import JSON, STOCK, config_class
from vllm_w8a8_bismooth.checkpoint import writer
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.serving import guard

K = "model.layers.1.self_attn.k_proj.weight"
MIXED = Recipe.of("mixed", group_size=32, group_layers=r"layers\.0\.mlp\.(gate|up|down)_proj")


def unhashed(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """Without the noted hashes, as in a checkpoint from elsewhere, so that vLLM goes on to read the change."""

    def without_report(folder: Path) -> None:
        (folder / "report.json").unlink()
        change(folder)

    return without_report


def edit_bytes(change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = bytearray(shard_of(folder, K).read_bytes())
        change(content)
        shard_of(folder, K).write_bytes(content)

    return edit


def flip(at: int) -> Callable[[Path], None]:
    return edit_bytes(lambda content: content.__setitem__(at, content[at] ^ 1))


def edit_quantization(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda config: change(config["quantization_config"]))


def drop_scale(folder: Path) -> None:
    edit_shard(folder, lambda tensors: tensors.pop(f"{K}_scale"), K)
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(f"{K}_scale"))


def narrow(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[K] = tensors[K][:-8].contiguous()
        tensors[f"{K}_scale"] = tensors[f"{K}_scale"][:-8].contiguous()

    edit_shard(folder, change, K)


def groups_of(size: int) -> Callable[[dict], None]:
    def change(config: dict) -> None:
        for group in config["config_groups"].values():
            for side in ("weights", "input_activations"):
                if group[side]["strategy"] == "group":
                    group[side]["group_size"] = size

    return change


class _Canary:
    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


def add_code(folder: Path) -> None:
    """Code of its own, for every place in which transformers and vLLM might look, and a pickle beside the weights."""
    canary = folder / "executed"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", "evil.T"]}
    edit_json(folder / "config.json", lambda config: config.update(auto_map=names))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": _Canary(canary)}))


def only_pickle(folder: Path) -> None:
    add_code(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()


FAULTS: Mapping[str, tuple[Callable[[Path], object], str | None]] = {
    "sound": (lambda folder: None, None),
    "code-and-pickle-beside": (add_code, None),
    "pickle-only": (only_pickle, "pickled files are refused"),
    "truncated": (edit_bytes(lambda c: c.__delitem__(slice(-100, None))), r"model-0000\d.* truncated or corrupt"),
    "empty": (edit_bytes(bytearray.clear), r"model-0000\d.* truncated or corrupt"),
    "absent": (lambda folder: shard_of(folder, K).unlink(), r"model-0000\d.* named by .* but absent"),
    "bit-in-header": (flip(30), r"model-0000\d.*(truncated or corrupt|SHA-256|missing)"),
    "bit-in-data": (flip(-1), r"model-0000\d\S*safetensors: has SHA-256 .* report.json noted"),
    "scale-missing": (unhashed(drop_scale), f"{K}_scale: is missing"),
    "scale-nan": (
        unhashed(lambda folder: edit_shard(folder, lambda t: t[f"{K}_scale"][5].fill_(float("nan")), K)),
        f"{K}_scale holds values that are missing or not finite",
    ),
    "scale-misshapen": (
        unhashed(lambda folder: edit_shard(folder, lambda t: t.update({f"{K}_scale": t[f"{K}_scale"][:7]}), K)),
        rf"{K}_scale: has shape \[7, 1\]",
    ),
    "shape": (unhashed(narrow), rf"{K} has shape \[56, 128\], but config.json makes it \[64, 128\]"),
    "another-config": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(intermediate_size=96)),
        r"layers.0.mlp.\w+_proj.weight has shape .*\b128\b.*, but config.json makes it .*\b96\b",
    ),
    "huge-groups": (edit_quantization(groups_of(2**60)), rf"gate_up_proj: K = 128 .* group_size = {2**60}"),
    "negative-groups": (edit_quantization(groups_of(-32)), "group_size|group size"),
    "no-groups": (edit_quantization(groups_of(0)), "group_size|group size"),
    "other-groups": (
        edit_quantization(groups_of(64)),
        r"mlp.\w+_proj.weight_scale has shape \[128, 4\], but config.json makes it \[128, 2\]",
    ),
    "slow-target": (
        edit_quantization(lambda c: next(iter(c["config_groups"].values()))["targets"].append(r"re:(\w+\.?)+!")),
        r"expression .* in quantization_config repeats a group",
    ),
    "slow-ignore": (edit_quantization(lambda c: c["ignore"].append("re:" + ".*" * 30 + "!")), "30 repeats"),
    "path": (
        lambda folder: edit_json(folder / INDEX, lambda i: i["weight_map"].update({K: "../../other.safetensors"})),
        "other.safetensors', which is not a shard of this folder",
    ),
}


def with_target(pattern: str) -> dict:
    return {"config_groups": {"g": {"targets": ["Linear", pattern]}}, "ignore": ["lm_head"]}


@pytest.mark.parametrize(
    "pattern",
    [
        r"re:.*\.layers\.(0|1|30)\.self_attn\.(q|k|v|qkv)_proj$",
        r"re:.*layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj",
        r"re:model\.layers\.[0-9]\.mlp\.gate$",
        r"re:(?:.*\.)?lm_head",
        "re:" + ".*" * 4 + "!",
    ],
)
def test_plain_expressions_are_taken_and_never_slow(pattern):
    guard.check_patterns(with_target(pattern))
    with patience(60):
        for layer in range(100):
            re.match(pattern[3:], f"model.layers.{layer}.self_attn.some_quite_long_name_of_a_linear.qkv_proj")


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        (r"re:(a+)+$", "repeats a group"),
        (r"re:(a|a)*$", "repeats a group"),
        (r"re:([)]|a){2,}$", "repeats a group"),
        (r"re:(?:\w+\.?)*!", "repeats a group"),
        ("re:" + "a?" * 30 + "a" * 30, "30 repeats"),
        ("re:(", "no regular expression"),
        ("re:" + "a" * 5000, "5000 characters"),
    ],
)
def test_slow_or_broken_expressions_are_refused(pattern, fault):
    for config in (with_target(pattern), {"ignore": [pattern]}):
        with pytest.raises(ValueError, match=fault):
            guard.check_patterns(config)


@given(JSON)
def test_expressions_of_any_config(value):
    for config in ({"ignore": value}, {"config_groups": value}, {"config_groups": {"g": {"targets": value}}}):
        with contextlib.suppress(ValueError):
            guard.check_patterns(config)


def test_hashing_can_be_left_out(make_checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert(make_checkpoint(), out, Recipe.of("rtn"))
    guard.check_files(out)
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors: has SHA-256"):
        guard.check_files(out)
    monkeypatch.setenv(guard.SKIP, "1")
    guard.check_files(out)


def test_what_is_not_here_is_passed_over(tmp_path):
    guard.check_files(Path("org/name"))
    guard.check_files(tmp_path)


@pytest.mark.parametrize("groups", [None, [], "x", [{}], {"g": None}, {"g": [1]}])
def test_groups_that_are_none(groups):
    with pytest.raises(ValueError, match="config_groups of quantization_config is no object of objects"):
        config_class().from_config(STOCK | {"config_groups": groups})


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, str | None]:
    """Fault -> what vLLM said of a checkpoint that has it."""
    root = tmp_path_factory.mktemp("faults")
    write_checkpoint(root / "source", tiny_model("llama", hidden_size=128, head_dim=32, intermediate_size=128))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_SIZE", SHARD)
        convert(root / "source", root / "whole", MIXED)
    for fault, (damage, _) in FAULTS.items():
        shutil.copytree(root / "whole", root / fault)
        damage(root / fault)
    environment = engine_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [
        sys.executable,
        "-m",
        "tests.support.workers.refusals",
        str(root / "answers.json"),
        *(str(root / f) for f in FAULTS),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert (root / "answers.json").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    assert not [path for fault in FAULTS for path in (root / fault).glob("executed")]
    return {Path(model).name: said for model, said in json.loads((root / "answers.json").read_text()).items()}


@pytest.mark.engine
@pytest.mark.parametrize("fault", FAULTS)
def test_refused_by_name(answers, fault):
    expected = FAULTS[fault][1]
    if expected is None:
        assert answers[fault] is None
    else:
        assert answers[fault] is not None, "vLLM served it"
        assert re.search(expected, answers[fault]), answers[fault]
