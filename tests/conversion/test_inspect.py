"""`bismooth inspect`: what headers tell, every problem at once, in little time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.convert import WHOLE_70B
from benchmarks.random_llama import checkpoint, hole
from tests.support.command import json_of, run
from tests.support.conversion import convert
from tests.support.damage import CASES, INDEX, Q, edit_json, edit_shard, index_to, shard_of, truncate
from tests.support.models import MODEL_TYPES
from tests.support.table import ARCHITECTURES
from vllm_w8a8_bismooth.checkpoint.files import Folder
from vllm_w8a8_bismooth.conversion.inspect import TENSOR_PARALLEL, survey
from vllm_w8a8_bismooth.recipe import Recipe


def inspect(source: Path, *options) -> tuple[int, dict]:
    code, out = run("inspect", source, "--json", *options)
    return code, json_of(out)


def test_whole_70b_takes_no_torch_and_little_time(tmp_path):
    """141 GB of sparse files, in a fresh process, with its imports, of a type whose sites were found out before.

    Elapsed time would measure the machine.
    """
    folder = checkpoint(tmp_path / "llama", WHOLE_70B, hole)
    survey(Folder(folder), 128, 32)
    script = (
        "import resource, sys; from vllm_w8a8_bismooth.cli import main as cli\n"
        "try: cli.app()\n"
        "finally:\n"
        "    used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "    heavy = {'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys()\n"
        "    print(used.ru_utime + used.ru_stime, sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script, "inspect", folder, "--json"], capture_output=True, text=True)
    found = json.loads(done.stdout)
    seconds, _, heavy = done.stderr.strip().partition(" ")
    assert done.returncode == 0 and heavy == "[]" and float(seconds) < 2, done.stderr
    assert found["parameters"] == 70_553_706_496 and found["source_bytes"] == 2 * found["parameters"]
    assert found["needs"]["data-free"]["written_bytes"] == pytest.approx(72.68e9, rel=1e-3)  # as llm-compressor's
    assert found["needs"]["calibrated"]["seconds"] > 3 * found["needs"]["data-free"]["seconds"]
    assert not found["problems"] and all(not found["per_group"][str(ranks)] for ranks in TENSOR_PARALLEL)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_type(make_checkpoint, tmp_path, model_type):
    source = make_checkpoint(model_type)
    found = survey(Folder(source), 128, 32)
    written = convert(source, tmp_path / "out", Recipe.of("rtn")).written_bytes
    assert not found.problems and found.needs["data-free"].written_bytes == written
    assert found.model_type == model_type and found.sizes["blocks"] == 3
    config = json.loads((source / "config.json").read_text())
    assert found.tied == config.get("tie_word_embeddings", ARCHITECTURES[model_type].tied)


def test_tensor_parallel(make_checkpoint):
    found = survey(Folder(make_checkpoint()), 128, 32)
    assert [ranks for ranks, reasons in found.per_channel.items() if not reasons] == [1, 2, 4]
    assert [ranks for ranks, reasons in found.per_group.items() if not reasons] == [1]
    assert "mlp.down_proj: a rank's share of K = 96 is not a multiple of group_size = 32" in found.per_group[2]


def test_people_read_it_too(make_checkpoint):
    code, out = run("inspect", make_checkpoint())
    assert code == 0
    for part in ("llama, 3 blocks", "BF16 in 30 tensors", "tensor parallel", "g = 128", "Next: bismooth convert "):
        assert part in out, out


# Whatever lies in the numbers, or in the names of other files, is not for headers to tell.
UNSEEN = {"NaN", "infinity in the embedding", "values that no model has", "another recipe.json"}


@pytest.mark.parametrize("case", sorted(CASES.keys() - UNSEEN))
def test_what_convert_refuses_is_a_problem(make_checkpoint, case):
    source = make_checkpoint()
    damage, parts = CASES[case]
    damage(source)
    code, found = inspect(source)
    assert code == 2 and all(part in "\n".join(found["problems"]) for part in parts), found["problems"]


def test_all_problems_at_once(make_checkpoint):
    """Each is told once: the tensors of a shard that cannot be read are no problems of their own."""
    source = make_checkpoint()
    lost = shard_of(source).name
    truncate(source)
    other, narrow = "model.layers.2.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    assert len({lost, shard_of(source, other).name, shard_of(source, narrow).name}) == 3
    edit_shard(source, lambda t: t.update({other: t[other].to(torch.float8_e4m3fn)}), other)
    edit_shard(source, lambda t: t.update({narrow: t[narrow][:, :32].contiguous()}), narrow)
    edit_json(source / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    code, found = inspect(source)
    problems = found["problems"]
    assert code == 2 and len(problems) == 4, problems
    for part in (lost, f"{other}: has dtype", narrow, "holds tensor model.norm.weight"):
        assert sum(part in problem for problem in problems) == 1, (part, problems)
    assert found["dtypes"]["F8_E4M3"]["tensors"] == 1 and found["needs"]["data-free"]["written_bytes"] > 0
    assert found["per_channel"]["2"] == [] and found["sizes"]["blocks"] == 3


def test_all_sizes_at_once(make_checkpoint):
    source = make_checkpoint()
    edit_json(source / "config.json", lambda config: config.update(hidden_size=None, vocab_size="x"))
    code, found = inspect(source)
    assert code == 2 and found["parameters"] > 0 and not found["sizes"]
    assert [p.split(" = ")[0] for p in found["problems"]] == ["config.json: hidden_size", "config.json: vocab_size"]


def test_quantized_checkpoint(make_checkpoint, tmp_path):
    """Our own result, for one: said to be quantized, and still described."""
    convert(make_checkpoint(), tmp_path / "out", Recipe.of("rtn"))
    code, found = inspect(tmp_path / "out")
    assert code == 2 and found["sizes"]["blocks"] == 3 and found["dtypes"]["I8"]["tensors"] == 21
    quantized = "already quantized (quantization_config.quant_method = 'compressed-tensors')"
    assert sum(quantized in problem for problem in found["problems"]) == 1
    assert len(found["problems"]) == 2, found["problems"]  # the config, and the dtype once
    code, out = run("inspect", tmp_path / "out")
    assert code == 2 and "I8 in 21 tensors" in out and "2 problems:" in out and "Next, once that is mended" in out


def test_problems_are_bounded(make_checkpoint, monkeypatch):
    monkeypatch.setattr("vllm_w8a8_bismooth.checkpoint.layout.PROBLEMS", 5)
    source = make_checkpoint()
    edit_json(source / "config.json", lambda config: config.update(intermediate_size=128))
    assert len(inspect(source)[1]["problems"]) == 5
    code, message = run("convert", source, source.with_name("out"))
    assert code == 2 and message.count("also: ") == 4


def test_convert_tells_the_first_problems(make_checkpoint):
    source = make_checkpoint()
    edit_json(source / "config.json", lambda config: config.update(intermediate_size=128))
    code, message = run("convert", source, source.with_name("out"))
    assert code == 2 and message.count("also: ") == 7 and message.endswith("and 1 more; bismooth inspect lists them")


def test_strange_index(make_checkpoint):
    source = make_checkpoint()
    index_to("../elsewhere.safetensors")(source)
    problems = inspect(source)[1]["problems"]
    assert len(problems) == 1 and Q in problems[0], problems
