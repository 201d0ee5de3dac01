import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import emulate
from tests.support.contents import digests, tensors_of
from tests.support.conversion import convert
from tests.support.damage import edit_json
from tests.support.models import MODEL_TYPES, tiny_model, write_checkpoint
from tests.support.moments import moments
from tests.support.sweep import sweep
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure.calibration import Calibration
from vllm_w8a8_bismooth.measure.text import CalibrationText, read_text, tokenize
from vllm_w8a8_bismooth.method.moments import Moments
from vllm_w8a8_bismooth.method.quantize import dequantize_weight
from vllm_w8a8_bismooth.method.rows import ALONE
from vllm_w8a8_bismooth.method.smooth import smooth_block
from vllm_w8a8_bismooth.model.names import Names
from vllm_w8a8_bismooth.recipe import Recipe

RTN = Recipe.of("rtn")


@pytest.mark.parametrize("model_type", sweep(MODEL_TYPES, 4))
@pytest.mark.parametrize("tied", [False, True])
def test_rtn_keeps_everything_but_the_linears(make_checkpoint, tmp_path, model_type, tied):
    source = make_checkpoint(model_type, tie_word_embeddings=tied)
    before = tensors_of(source)
    report = convert(source, tmp_path / "out", RTN)
    after = tensors_of(tmp_path / "out")
    linears = {name.removesuffix("_scale") for name in after if name.endswith("_scale")}
    assert linears == {n for n in before if re.search(r"(_proj|\.w[123])\.weight$", n)}
    assert {n.removesuffix(".weight") for n in linears} == report.linears.keys()
    for name, tensor in before.items():
        if name in linears:
            assert after[name].dtype == torch.int8 and after[f"{name}_scale"].shape == (len(tensor), 1)
            step = after[f"{name}_scale"]
            assert ((dequantize_weight(after[name], step) - tensor.float()).abs() <= step * 0.50001).all()
        else:
            assert torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype


def test_shards_and_index_agree(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("vllm_w8a8_bismooth.checkpoint.writer.SHARD_SIZE", "40KB")
    out = tmp_path / "out"
    report = convert(make_checkpoint(), out, RTN)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = {p.name for p in out.glob("*.safetensors")}
    assert len(shards) > 3 and shards == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == report.written_bytes == sum(t.nbytes for t in tensors_of(out).values())
    assert len({p.stat().st_mode for p in out.iterdir() if p.is_file()}) == 1, "shards are readable like the rest"
    for name, file in index["weight_map"].items():
        with safe_open(out / file, framework="pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
            assert shard.metadata() == {"format": "pt"}


def test_single_file_sources_give_the_same_tensors(make_checkpoint, tmp_path):
    source = make_checkpoint(sharded=False)
    assert (source / "model.safetensors").exists()
    convert(source, tmp_path / "a", RTN)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (sharded / "config.json").write_bytes((source / "config.json").read_bytes())
    convert(sharded, tmp_path / "b", RTN)
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_side_files_are_copied_byte_for_byte_and_the_source_stays(make_checkpoint, tmp_path):
    source = make_checkpoint()
    (source / "pytorch_model.bin").write_bytes(b"never copied")
    (source / ".hidden").write_bytes(b"nor this")
    before = digests(source)
    convert(source, tmp_path / "out", RTN)
    assert digests(source) == before
    after = digests(tmp_path / "out")
    copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    for name in copied:
        assert after[name] == before[name]
    assert not {"pytorch_model.bin", ".hidden", "extra/notes.bin.txt"} & after.keys()


def test_same_recipe_gives_the_same_bytes(make_checkpoint, tmp_path, calibration_text):
    source, recipe = make_checkpoint(), Recipe.of("bismooth", calibration_tokens=1000)
    for name in "ab":
        convert(source, tmp_path / name, recipe, read_text(calibration_text))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_second_run_is_recognised_and_another_recipe_refused(make_checkpoint, tmp_path, calibration_text):
    source, out = make_checkpoint(), tmp_path / "out"
    first = convert(source, out, Recipe.of("bismooth"), read_text(calibration_text))
    before = digests(out)
    again = convert(source, out, Recipe.of("bismooth"), read_text(calibration_text))
    assert first.linears and replace(first, reused=True) == again
    with pytest.raises(BismoothError, match=r"another conversion \(alpha: None there, 0.7 now; smoothing: 'balanced' "):
        convert(source, out, Recipe.of("bismooth", smoothing="alpha", alpha=0.7), read_text(calibration_text))
    with pytest.raises(BismoothError, match=r"calibration: calibration.txt \([0-9a-f]{12}\) there, None now"):
        convert(source, out, Recipe.of("bismooth"))
    edit_json(source / "config.json", lambda c: c.update(rope_theta=5.0))
    with pytest.raises(BismoothError, match="source: "):
        convert(source, out, Recipe.of("bismooth"), read_text(calibration_text))
    assert digests(out) == before


def test_a_source_that_differs_in_one_weight_is_another_source(make_checkpoint, tmp_path):
    source = make_checkpoint(sharded=False, hidden_size=512, vocab_size=4000)
    shard = source / "model.safetensors"
    assert shard.stat().st_size > 4 * 2**20
    convert(source, tmp_path / "out", RTN)
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(BismoothError, match="another conversion .source: "):
        convert(source, tmp_path / "out", RTN)


def test_odd_destinations(make_checkpoint, tmp_path):
    """An empty folder, and a link to one, are filled; config.json may hold any JSON string."""
    source = make_checkpoint()
    edit_json(source / "config.json", lambda c: c.update(note="\ud800 \u00e9"))
    for name in ("here", "real"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(source, tmp_path / "link", RTN)
    convert(source, tmp_path / "here", RTN)
    assert digests(tmp_path / "real") == digests(tmp_path / "here")
    assert json.loads((tmp_path / "real" / "config.json").read_text())["note"] == "\ud800 \u00e9"


def test_destinations_that_are_refused(make_checkpoint, tmp_path):
    source = make_checkpoint()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(BismoothError, match="no result of bismooth"):
        convert(source, other, RTN)
    for overlapping in (source, source / "int8", source.parent):
        with pytest.raises(BismoothError, match="overlaps the source"):
            convert(source, overlapping, RTN)
    assert digests(other).keys() == {"thesis.txt"}


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_per_group_checkpoint(make_checkpoint, tmp_path, model_type):
    recipe = Recipe.of("mixed", group_size=32, group_layers=r"layers\.1\.(self_attn\.k_proj|mlp\.down_proj)")
    report = convert(make_checkpoint(model_type), tmp_path / "out", recipe)
    grouped = {n.removeprefix("model.layers.1.") for n, e in report.linears.items() if e["group_size"] == 32}
    assert grouped == {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"}
    tensors = tensors_of(tmp_path / "out")
    assert tensors["model.layers.1.mlp.down_proj.weight_scale"].shape == (64, 3)
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].shape == (64, 1)


ATTENTION, EXPERTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), range(4)
# Model type -> --ignore, and what it leaves in float: name inside a block -> blocks.
IGNORED = {
    "llama": (r"layers\.1\.self_attn\.v_proj|down", dict.fromkeys(ATTENTION, [1]) | {"mlp.down_proj": [0, 1, 2]}),
    "gemma2": (r"layers\.[02]\.mlp\.up_proj", dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), [0, 2])),
    "phi3": (r"layers\.2\.self_attn", dict.fromkeys(("self_attn.qkv_proj", "self_attn.o_proj"), [2])),
    "mixtral": (
        r"layers\.1\.(self_attn\.k|.*experts)",
        dict.fromkeys((*ATTENTION, *(f"block_sparse_moe.experts.{e}.w{w}" for e in EXPERTS for w in (1, 2, 3))), [1]),
    ),
    "qwen2_moe": (
        r"shared_expert\.up|layers\.2\.mlp\.experts\.",
        dict.fromkeys(("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"), [1, 2])
        | dict.fromkeys((f"mlp.experts.{e}.{p}_proj" for e in EXPERTS for p in ("gate", "up", "down")), [2]),
    ),
}


@pytest.mark.parametrize("model_type", sweep(IGNORED))
def test_ignored_linears_keep_their_dtype(make_checkpoint, tmp_path, calibration_text, model_type, monkeypatch):
    """They hold the folded source, all else is as without the option, and compressed-tensors' matcher agrees."""
    from compressed_tensors.utils.match import is_match

    folds = []

    def recorded(*arguments):
        folds.append(smooth_block(*arguments))
        return folds[-1]

    monkeypatch.setattr("vllm_w8a8_bismooth.conversion.stages.smooth_block", recorded)
    source, text = make_checkpoint(model_type), read_text(calibration_text)
    pattern, names = IGNORED[model_type]
    report = convert(source, tmp_path / "out", Recipe.of("bismooth", calibration_tokens=500, ignore=pattern), text)
    whole = convert(source, tmp_path / "whole", Recipe.of("bismooth", calibration_tokens=500), text)
    ignored = {Names().block(i) + name for name, blocks in names.items() for i in blocks}
    assert set(report.ignored) == ignored and whole.ignored == []
    assert report.linears == {name: entry for name, entry in whole.linears.items() if name not in ignored}
    before, after, without = (tensors_of(folder) for folder in (source, tmp_path / "out", tmp_path / "whole"))
    assert without.keys() - after.keys() == {f"{name}.weight_scale" for name in ignored}
    for name, tensor in after.items():
        linear = name.removesuffix(".weight")
        if linear not in ignored:
            assert torch.equal(tensor, without[name])
            continue
        _, _, block, inside = linear.split(".", 3)
        fold, expected = folds[int(block)].fold(inside), before[name].float()
        expected = expected if fold.rows is None else expected / fold.rows[:, None]
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, (expected if fold.columns is None else expected * fold.columns).bfloat16())

    tokens = torch.randint(2, 160, (2, 64), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, *found = (emulate.load(f)(tokens).logits for f in (source, tmp_path / "out", tmp_path / "whole"))
    # The median of the tokens: rounding may send one to another expert.
    out, all_of_it = ((logits - expected).norm(dim=-1).div(expected.norm(dim=-1)).median() for logits in found)
    assert out < 1.1 * all_of_it < 0.05

    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    candidates, expected = {"lm_head"}, {"lm_head", *ignored}
    for i in range(12):
        block, layer = Names().block(i), Source(source).layers[min(i, 2)]
        candidates |= {block + name for name in (*layer.linears, *layer.fused)}
        expected |= {block + fused for fused, parts in layer.fused.items() if block + parts[0] in ignored}
    linear = torch.nn.Identity()
    assert {n for n in candidates if any(is_match(n, linear, target) for target in config["ignore"])} == expected


def test_ignored_linears_are_neither_vulnerable_nor_per_group(tmp_path):
    model, name = tiny_model("llama"), "model.layers.1.self_attn.q_proj.weight"
    model.state_dict()[name][:, 5] *= 1000
    source = write_checkpoint(tmp_path / "source", model)
    assert convert(source, tmp_path / "all", RTN).vulnerable() == [name.removesuffix(".weight")]
    for method in ("rtn", "mixed"):
        options = {"group_size": 32} if method == "mixed" else {}
        report = convert(source, tmp_path / method, Recipe.of(method, ignore=r"layers\.1\.self_attn\.k", **options))
        assert report.vulnerable() == [] and not any(entry["group_size"] for entry in report.linears.values())
        written = json.loads((tmp_path / method / "report.json").read_text())
        assert written["ignored"] == [f"model.layers.1.self_attn.{p}_proj" for p in "kqv"]
        assert len(written["linears"]) == 18
        assert torch.equal(tensors_of(tmp_path / method)[name], tensors_of(source)[name])


def test_config_is_read_as_meant_by_compressed_tensors(make_checkpoint, tmp_path):
    """The library's own matcher must give each linear, and vLLM's fused one, the granularity of its tensors."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match
    from transformers import AutoConfig, AutoModelForCausalLM

    source = make_checkpoint()
    convert(source, tmp_path / "out", Recipe.of("mixed", group_size=32, group_layers=r"layers\.1\.self_attn\.v_proj"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    assert {k: v for k, v in written.items() if k != "quantization_config"} == original
    assert written["quantization_config"]["bismooth"]["method"] == "mixed"
    parsed = QuantizationConfig.model_validate(written["quantization_config"])
    group, channel = parsed.config_groups["group_0"], parsed.config_groups["group_1"]
    assert (group.weights.strategy, group.input_activations.strategy) == ("group", "group")
    assert group.weights.group_size == group.input_activations.group_size == 32
    assert (channel.weights.strategy, channel.input_activations.strategy) == ("channel", "token")
    assert parsed.format == "int-quantized" and parsed.ignore == ["lm_head"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**original))
    matched = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(is_match(name, module, t) for t in group.targets)
    }
    assert matched == {f"model.layers.1.self_attn.{p}_proj" for p in "qkv"}
    fused = torch.nn.Identity()
    assert any(is_match("model.layers.1.self_attn.qkv_proj", fused, t) for t in group.targets)
    assert not any(is_match("model.layers.11.self_attn.qkv_proj", fused, t) for t in group.targets)


@pytest.mark.parametrize("model_type", sweep(["qwen2", "llama", "qwen3", "mistral"]))
def test_converted_models_stay_close(make_checkpoint, tmp_path, calibration_text, model_type):
    source = make_checkpoint(model_type)
    tokens = torch.randint(2, 160, (2, 64), generator=torch.Generator().manual_seed(3))
    original = emulate.load(source)
    arms = {
        "rtn": (Recipe.of("rtn"), 0.03),
        "mixed": (Recipe.of("mixed", group_size=32, group_layers="down_proj"), 0.03),
        "bismooth": (Recipe.of("bismooth", rounding="nearest"), 0.03),
        # Made up for is what the calibration shows, which is a few letters, again and again; these tokens are any.
        "compensated": (Recipe.of("bismooth"), 0.04),
    }
    with torch.no_grad():
        expected = original(tokens).logits
        for arm, (recipe, most) in arms.items():
            text = read_text(calibration_text) if recipe.method == "bismooth" else None
            convert(source, tmp_path / arm, recipe, text)
            error = (emulate.load(tmp_path / arm)(tokens).logits - expected).norm() / expected.norm()
            assert error < most, (arm, error)


def whole_model(folder: Path) -> torch.nn.Module:
    capped = "gemma2" in (folder / "config.json").read_text()  # sdpa would ignore its soft cap
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager" if capped else "sdpa")


@torch.no_grad()
def moments_of_the_whole_model(source: Source, tokens: torch.Tensor) -> list[dict[str, Moments]]:
    """What :class:`Calibration` should find, from transformers' own model with all its weights."""
    model, seen = whole_model(source.checkpoint.folder), [{} for _ in source.layers]
    for i, block in enumerate(model.model.layers):
        for site in source.layers[i].sites:

            def record(module, inputs, i=i, site=site.name):
                seen[i][site] = moments(inputs[0].flatten(0, -2))

            name = site.consumers[-1].replace("block_sparse_moe.", "mlp.")
            if "experts." not in name:
                block.get_submodule(name).register_forward_pre_hook(record)
    model(tokens)
    return seen


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [(t, {}) for t in MODEL_TYPES]
    + [("qwen3", {"attention_bias": True}), ("mistral", {"sliding_window": 32})]
    # A number beyond the rows of the embedding that occur, which are all that calibration holds.
    + [(t, {"pad_token_id": 159}) for t in MODEL_TYPES],
)
def test_streamed_calibration_equals_the_whole_model(
    make_checkpoint, calibration_text, model_type, changes, monkeypatch
):
    monkeypatch.setattr("vllm_w8a8_bismooth.measure.calibration._CHUNK", 200)
    source = Source(make_checkpoint(model_type, torch.float32, **changes))
    tokens = tokenize(read_text(calibration_text), source.checkpoint, 1000)
    assert tokens.shape == (7, 128)
    calibration = Calibration(source, tokens, torch.device("cpu"))
    expected = moments_of_the_whole_model(source, tokens)
    for i, names in enumerate(source.blocks):
        block = {name: source.checkpoint.read(Names().block(i) + name) for name in names}
        found = calibration.advance(i, block, ALONE)
        assert found.keys() == {site.name for site in source.layers[i].sites}
        compared = 0
        for site, measured in found.items():
            if site in expected[i]:  # transformers stacks experts, so that nothing of theirs can be hooked
                assert measured.rows == tokens.numel()
                for name, tensor in measured.tensors().items():
                    torch.testing.assert_close(tensor, expected[i][site].tensors()[name], rtol=1e-3, atol=1e-5)
                compared += 1
        assert compared >= 3
    model = whole_model(source.checkpoint.folder).model
    model.norm = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(calibration.hidden, model(tokens).last_hidden_state, rtol=1e-4, atol=1e-4)


def written(folder: Path, *documents: str) -> CalibrationText:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return read_text(path)


def said(folder: Path, tokens: torch.Tensor) -> str:
    """The characters of a window, which the tests' tokenizer has one token for each."""
    return "".join(AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(tokens.tolist()))


def counted(start: int, end: int) -> str:
    """Text in which every place is known from the eight characters there."""
    return "".join(f"{i:07d}," for i in range(start, end))


TEXTS = {
    "one long document": [counted(0, 20000)],
    "many short documents": [counted(10 * i, 10 * i + 10) for i in range(2000)],
    "documents of all lengths": [counted(n * n, (n + 1) ** 2) for n in range(141)],
}


@pytest.mark.parametrize("budget", [1, 100, 1000, 5000])
@pytest.mark.parametrize("case", TEXTS)
def test_windows_are_spread_over_the_text(make_checkpoint, tmp_path, case, budget):
    """Whole pieces of the text in its order, from beginning to end at even distances, no more than the budget."""
    source, text = Checkpoint(make_checkpoint()), written(tmp_path, *TEXTS[case])
    tokens = tokenize(text, source, budget)
    assert torch.equal(tokens, tokenize(text, source, budget)), "the same every time"
    length = min(128, budget)  # the model's longest position
    assert tokens.dtype == torch.int64 and tokens.shape == (budget // length, length)
    whole, starts = "".join(TEXTS[case]), []
    for window in tokens:
        at = [whole.index(piece) for piece in re.findall(r"\d{7},", said(source.folder, window))]
        assert len(at) >= (length - 14) // 8
        starts += at[:1]
        steps = [b - a for a, b in zip(at, at[1:], strict=False)]
        assert all(step > 0 for step in steps)
        assert sum(step != 8 for step in steps) <= 1 or len(TEXTS[case]) > 1, "a seam only between pieces"
    assert starts == sorted(set(starts))
    if len(starts) > 5:
        distances = [b - a for a, b in zip(starts, starts[1:], strict=False)]
        assert max(distances) < 2.5 * len(whole) / len(starts) and starts[-1] > 0.7 * len(whole)


@pytest.mark.parametrize(("characters", "shape"), [(1, (1, 1)), (127, (1, 127)), (128, (1, 128)), (300, (2, 128))])
def test_short_texts(make_checkpoint, tmp_path, characters, shape):
    """Shorter than one window, all of it is one."""
    documents = [piece for piece in ("x" * (characters // 2), "y" * (characters - characters // 2)) if piece]
    source = make_checkpoint()
    tokens = tokenize(written(tmp_path, *documents), Checkpoint(source), 10000)
    assert tokens.shape == shape
    assert said(source, tokens.flatten()) == "".join(documents)[: tokens.numel()]


def test_every_window_begins_as_the_model_is_used_to(make_checkpoint, tmp_path):
    source = make_checkpoint()
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    begin = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
    tokenizer["post_processor"] = {"type": "TemplateProcessing", "single": begin, "pair": begin}
    tokenizer["post_processor"]["special_tokens"] = special
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    for budget, shape in ((1000, (7, 128)), (2, (1, 2))):
        tokens = tokenize(written(tmp_path, *TEXTS["one long document"]), Checkpoint(source), budget)
        assert tokens.shape == shape and (tokens[:, 0] == 0).all() and (tokens[:, 1:] != 0).all()


def test_a_large_text_is_not_all_tokenized(make_checkpoint, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    source, documents = Checkpoint(make_checkpoint()), TEXTS["one long document"] * 10
    text = written(tmp_path, *documents)
    asked, call = [], PreTrainedTokenizerFast.__call__

    def counting(self, piece, *arguments, **options):
        asked.append(len(piece))
        return call(self, piece, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)
    tokens = tokenize(text, source, 1000)
    assert tokens.numel() == 7 * 128 and sum(asked) < 0.02 * sum(map(len, documents)) + 4096


@pytest.mark.slow
def test_offline_half_never_imports_vllm(make_checkpoint, tmp_path, calibration_text):
    script = (
        "import sys; from vllm_w8a8_bismooth.cli import main as cli; "
        f"sys.argv = ['bismooth', 'convert', {str(make_checkpoint())!r}, {str(tmp_path / 'out')!r}, "
        f"'--calibration', {str(calibration_text)!r}]\n"
        "try: cli.main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'vllm'], 'vllm was imported'"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "out" / "recipe.json").exists()
