"""What people get beside the weights: the card, the figures, and the last words on the console."""

import json
import sys
from dataclasses import asdict

import pytest
import torch
from huggingface_hub import ModelCard

from tests.support.command import run
from tests.support.contents import digests
from tests.support.conversion import convert
from tests.support.damage import edit_shard
from tests.support.effort import calls
from tests.support.moments import moments, noise
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure.text import read_text
from vllm_w8a8_bismooth.method.balance import by_error
from vllm_w8a8_bismooth.method.rows import Fold
from vllm_w8a8_bismooth.method.smooth import smooth_block
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.report import figures, front_matter

RTN = Recipe.of("rtn")
TAGS = ["int8", "w8a8", "compressed-tensors", "vllm", "bismooth"]
ORIGINAL = """---
license: llama3.1
license_name: Llama 3.1 Community License
license_link: https://example.com/LICENSE
language: [en, no]
base_model: somebody/else
tags: [unrelated]
---
# Precious
"""


def test_card_is_read_back(make_checkpoint, tmp_path, calibration_text):
    source, out = make_checkpoint(), tmp_path / "out"
    (source / "README.md").write_text(ORIGINAL)
    recipe = Recipe.of("bismooth", calibration_tokens=500, group_size=32, group_layers=r"layers\.1\.mlp|```\n# x")
    text = read_text(calibration_text)
    convert(source, out, recipe, text)
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict() == {
        "language": ["en", "no"],
        "license": "llama3.1",
        "license_name": "Llama 3.1 Community License",
        "license_link": "https://example.com/LICENSE",
        "library_name": "vllm",
        "pipeline_tag": "text-generation",
        "tags": TAGS,
    }
    assert (out / "ORIGINAL_README.md").read_text() == ORIGINAL and "(ORIGINAL_README.md)" in card.text
    for part in ("# source, INT8 W8A8", "vllm serve", "bismooth verify", "2408.15301", "2211.10438", text.sha256):
        assert part in card.text
    assert (
        "need the plugin `vllm-w8a8-bismooth`" in card.text
        and "| of these with per-group scales | 3 (14.3%) |" in card.text
    )
    assert "| further linears, left in float | 0 |" in card.text and "Exempt" not in card.text
    assert card.text.count("\n| `model.layers.") == 10
    used = f"`{calibration_text.name}`: 384 tokens in 3 windows, from 1 of 1 documents, computed in "
    assert used in card.text
    stored = json.loads(card.text.split("```json\n")[1].split("```\n")[0])
    assert stored == json.loads((out / "recipe.json").read_text())["recipe"]
    worst = json.loads((out / "report.json").read_text())["linears"]
    name = max(worst, key=lambda name: worst[name]["column_error"])
    assert f"| `{name}` | per channel | {worst[name]['column_error']:.4f} |" in card.text.split("The worst:")[1]


BOMB = "a: &a {x: 1}\n" + "".join(
    f"{c}: &{c} {{<<: [{', '.join(['*' + b] * 9)}]}}\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True)
)
MOST_CALLS = 200_000
HOSTILE = {
    "none": b"",
    "no front matter": b"# Model\nlicense: mit\n",
    "unclosed": b"---\nlicense: mit\n",
    "not YAML": b"---\nlicense: mit\n{{{{\n---\n",
    "a list": b"---\n- license: mit\n---\n",
    "binary": bytes(range(256)) * 10,
    "not UTF-8": b"---\nlicense: \xff\xfe\n---\n",
    "python": b"---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
    "deep": b"---\nlicense: " + b"[" * 30000 + b"\n---\n",
    "huge": b"---\nx: " + b"a" * 10**6 + b"\nlicense: mit\n---\n",
    "many lines": b"---\n" + b"\n" * 10**6 + b"license: mit\n---\n",
    "recursive": b"---\nlicense: &a [*a]\nlanguage: &b [*b]\n---\n",
    "merge bomb": b"---\n" + BOMB.encode() + b"license: *i\n---\n",
    "bad escape": b'---\nlicense: "\\UFFFFFFFF"\n---\n',
    "wrong types": b"---\nlicense: [mit]\nlicense_name: {a: b}\nlanguage: [[en], {a: b}]\nlicense_link: 5 5\n---\n",
    "markup": b'---\nlicense: "mit\\n---\\n# Free"\nlicense_name: "<b>"\nlicense_link: "javascript:alert(1)"\n---\n',
    "long": b"---\nlicense: " + b"m" * 500 + b"\nlanguage: [" + b"en, " * 500 + b"en]\n---\n",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_front_matter_does_no_harm(tmp_path, case):
    """And little work: what is parsed of a card is bounded, whatever is in it."""
    (tmp_path / "README.md").write_bytes(HOSTILE[case])
    assert front_matter.inherited(tmp_path / "README.md") == {}
    assert calls(lambda: front_matter.inherited(tmp_path / "README.md")) < MOST_CALLS


def test_what_can_be_believed_is_kept(tmp_path):
    original = tmp_path / "README.md"
    lines = ("---", "license: other", "license_link: LICENSE", "license_name: '<i>'", "language: no", "---", "")
    original.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert front_matter.inherited(original) == {"license": "other", "license_link": "LICENSE", "language": "no"}
    original.unlink()
    assert front_matter.inherited(original) == {}


def test_hostile_cards_and_names_are_converted(make_checkpoint, tmp_path):
    source = make_checkpoint(num_hidden_layers=1)
    for i, case in enumerate(("merge bomb", "markup")):
        (source / "README.md").write_bytes(HOSTILE[case])
        convert(source, tmp_path / f"out-{i}", RTN)
        card = ModelCard.load(tmp_path / f"out-{i}" / "README.md")
        assert "license" not in card.data.to_dict() and card.data.tags == TAGS
    odd = source.rename(tmp_path / "<script>`|\n# \u00e9{name}")
    convert(odd, tmp_path / "odd", RTN)
    assert ModelCard.load(tmp_path / "odd" / "README.md").text.startswith("\n# _script_____ __name_, INT8 W8A8\n")


@pytest.mark.parametrize("model_type", ["llama", "qwen2_moe"])
def test_figures_are_drawn_and_the_same_every_time(make_checkpoint, tmp_path, calibration_text, model_type):
    source, recipe = make_checkpoint(model_type), Recipe.of("bismooth", calibration_tokens=300)
    for name in "ab":
        convert(source, tmp_path / name, recipe, read_text(calibration_text))
    found = digests(tmp_path / "a")
    assert found == digests(tmp_path / "b")
    assert {"figures/errors.svg", "figures/weights.svg"} <= found.keys()
    card = (tmp_path / "a" / "README.md").read_text()
    assert "(figures/errors.svg)" in card and "(figures/weights.svg)" in card
    drawn = (tmp_path / "a" / "figures" / "weights.svg").read_text()
    assert "up \u2192 down" in drawn and "before" in drawn and "<dc:date>" not in drawn


def test_figures_do_not_follow_matplotlibrc(make_checkpoint, tmp_path):
    import matplotlib

    source = make_checkpoint(num_hidden_layers=1)
    convert(source, tmp_path / "a", RTN)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "none", "axes.grid": True}):
        convert(source, tmp_path / "b", RTN)
        assert matplotlib.rcParams["font.size"] == 30
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_without_matplotlib_there_are_no_figures(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    convert(make_checkpoint(), tmp_path / "out", RTN)
    assert (
        not (tmp_path / "out" / "figures").exists() and "figures/" not in (tmp_path / "out" / "README.md").read_text()
    )


def test_weights_that_are_zero_can_be_drawn(make_checkpoint, tmp_path):
    source = make_checkpoint(num_hidden_layers=1)
    names = [name for name in Source(source).checkpoint.headers if name.endswith("_proj.weight")]
    for name in names:
        edit_shard(source, lambda tensors, name=name: tensors[name].zero_(), name)
    convert(source, tmp_path / "out", Recipe.of("bismooth"))
    assert "exact" in (tmp_path / "out" / "README.md").read_text()
    assert run("analyze", source, "--figures", tmp_path / "figures")[0] == 0


def test_ours_are_not_taken_by_the_source(make_checkpoint, tmp_path):
    source = make_checkpoint()
    (source / "figures").mkdir()
    (source / "figures" / "errors.svg").write_text("theirs")
    with pytest.raises(BismoothError, match="our own figures/errors.svg would take its place"):
        convert(source, tmp_path / "out", RTN)


def test_last_words(make_checkpoint, tmp_path):
    source, out = make_checkpoint(), tmp_path / "out"
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_shard(source, lambda tensors: tensors[name][:, 5].mul_(1000), name)
    code, output = run("convert", source, out, "--method", "rtn")
    lines = output.splitlines()
    assert code == 0 and f"Next: bismooth verify {out}" in output and f"      vllm serve {out}" in output
    worst = lines.index(next(line for line in lines if "the worst five" in line))
    assert lines[worst + 1].endswith(name.removesuffix(".weight")) and lines[worst + 5].startswith("  0.0")
    assert "Warning: 1 linears lose their weights" in output


def test_last_words_on_ignored_linears(make_checkpoint, tmp_path):
    source, out = make_checkpoint(), tmp_path / "out"
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_shard(source, lambda tensors: tensors[name][:, 5].mul_(1000), name)
    options = ("--method", "rtn", "--ignore", r"layers\.1\.self_attn\.q")
    code, output = run("convert", source, out, *options, "--dry-run")
    assert code == 0 and "3 linears left in float: k_proj, q_proj, v_proj in block 1\n" in output
    code, output = run("convert", source, out, *options)
    assert code == 0 and "18 linears per-channel, 0 per-group, 3 left in float." in output and "Warning" not in output
    card = (out / "README.md").read_text()
    for part in ("18 linears of its decoder blocks\nhold", "Exempt are", "left in float | 3 |", "No linear is above"):
        assert part in card
    assert "| `q_proj` | 2 |" in card


def test_wide_figures(tmp_path):
    """Eighty blocks, of which some have no experts and one is all zero."""
    linears = {
        f"model.layers.{b}.{kind}": {"group_size": 64 if b < 3 else None, "column_error": b % 7 / 100, "sqnr": None}
        for b in range(80)
        for kind in (
            "self_attn.q_proj",
            *(["mlp.up_proj"] if b == 0 else ["mlp.experts.0.up_proj", "mlp.experts.1.up_proj"]),
        )
    }
    site = dict(site="up->down.3", weight_min=0.0, weight_median=0.1, weight_max=200.0)
    site |= dict(smoothed_min=0.1, smoothed_median=0.2, smoothed_max=0.3)
    zero = {key: value if key == "site" else 0.0 for key, value in site.items()}
    paths = figures.of_conversion(linears, {b: [zero if b == 5 else site] for b in range(1, 80)}, tmp_path)
    assert [path.name for path in paths] == ["errors.svg", "weights.svg"]
    assert all(10**4 < path.stat().st_size < 10**6 for path in paths)


def test_factors_hold_the_smoothed_range(make_checkpoint):
    source = Source(make_checkpoint(dtype=torch.float32))
    layer = source.layers[0]
    block = {name: source.checkpoint.read(f"model.layers.0.{name}") for name in source.blocks[0]}
    behind_norms = [site for site in layer.sites if site.producer not in layer.linears]
    read = {site.name: moments(noise(9, 64)) for site in behind_norms}
    smoothing = smooth_block(block, read, layer, by_error)
    for found, site in zip(map(asdict, smoothing.sites), behind_norms, strict=True):
        for prefix, fold in (("weight", lambda consumer: Fold()), ("smoothed", smoothing.fold)):
            extent = torch.stack([fold(c).column_extent(block[f"{c}.weight"]) for c in site.consumers]).amax(0)
            for name, statistic in (("min", torch.min), ("median", torch.median), ("max", torch.max)):
                assert found[f"{prefix}_{name}"] == pytest.approx(float(statistic(extent)))
