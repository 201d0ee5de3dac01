"""Conversions of models that the table does not have: sites found out, given, noted and checked again; own code."""

import json
from pathlib import Path

import pytest

import vllm_w8a8_bismooth as b
from tests.support import own
from tests.support.command import run
from tests.support.contents import digests
from tests.support.damage import edit_json
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.discovery import instance
from vllm_w8a8_bismooth.errors import BismoothError

TYPE = "gpt_neox"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "sites-cache"))


def layout_of(folder: Path) -> dict:
    return json.loads((folder / "recipe.json").read_text())["layout"]


def findings(folder: Path, **options) -> list[str]:
    return list(map(str, b.verify(folder, engine=False, **options).findings))


def fewer_sites(source: Path, file: Path, producer: str = "post_attention_layernorm") -> Path:
    """A record without one of the sites."""
    record = b.sites(source).record.to_json()
    layer = record["templates"][0]
    layer["sites"] = [site for site in layer["sites"] if site["producer"] != producer]
    file.write_text(json.dumps(record))
    return file


def test_the_recipe_holds_what_was_found_out(make_checkpoint, tmp_path):
    source, out = make_checkpoint(TYPE), tmp_path / "out"
    b.convert(source, out, calibration="none")
    layout = layout_of(out)
    assert layout["from"] == "discovery" and layout["versions"].keys() == {
        "vllm_w8a8_bismooth",
        "transformers",
        "torch",
    }
    assert layout["record"] == b.sites(source).record.to_json()
    assert len((out / "recipe.json").read_text().splitlines()) < 45, "the record stands on one line"
    assert findings(out) == findings(out, against=source) == []
    assert b.convert(source, out, calibration="none").reused


def test_verify_finds_out_again(make_checkpoint, tmp_path):
    """Another record is a fault, but where other versions noted it: then it is a note, and what is noted counts."""
    source, out = make_checkpoint(TYPE), tmp_path / "out"
    b.convert(source, out, calibration="none")
    from vllm_w8a8_bismooth.checkpoint.basis import digest
    from vllm_w8a8_bismooth.discovery.reading import read

    def spoil(recipe: dict) -> None:
        recipe["layout"]["record"]["templates"][0]["sites"].pop()
        recipe["layout"]["sha256"] = digest(read(recipe["layout"]["record"]))

    edit_json(out / "recipe.json", spoil)
    (fault,) = findings(out)
    assert "recipe.json: layout" in fault and "is not that of a model with this config.json" in fault
    edit_json(out / "recipe.json", lambda r: r["layout"]["versions"].update(transformers="5.0.0"))
    found = b.verify(out, engine=False)
    assert found.ok and any("noted by" in note and "transformers 5.0.0" in note for note in found.notes), found.notes
    # the site that the record lacks was folded, and --against goes by the record
    assert any("post_attention_layernorm" in f or "dense_h_to_4h" in f for f in findings(out, against=source))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda r: r["layout"].update(record=7), "not an object"),
        (lambda r: r["layout"].update(sha256="0" * 64), "does not have the SHA-256"),
        (lambda r: r["layout"]["record"].update(experts=[10**12]), "experts must be numbers"),
        (lambda r: r.update(layout=[]), "where the sites are from"),
        (lambda r: r["layout"].pop("versions"), "of which versions"),
    ],
)
def test_a_recipe_that_was_spoilt_is_a_fault(make_checkpoint, tmp_path, change, part):
    out = tmp_path / "out"
    b.convert(make_checkpoint(TYPE), out, method="rtn")
    edit_json(out / "recipe.json", change)
    assert any(part in fault for fault in findings(out)), findings(out)


@pytest.mark.parametrize("model_type", ["llama", TYPE])
def test_recipes_of_earlier_versions_are_read(make_checkpoint, tmp_path, model_type):
    source, out = make_checkpoint(model_type), tmp_path / "out"
    b.convert(source, out, method="rtn")
    edit_json(out / "recipe.json", lambda r: (r.pop("layout"), r["recipe"].pop("sites")))
    assert findings(out) == findings(out, against=source) == []
    assert b.convert(source, out, method="rtn").reused


def test_given_sites_are_used(make_checkpoint, tmp_path):
    source, out = make_checkpoint(TYPE), tmp_path / "out"
    given = fewer_sites(source, tmp_path / "sites.json")
    outcome = b.convert(source, out, calibration="none", sites=given)
    assert {site["site"] for sites in outcome.sites.values() for site in sites} == {"norm->query_key_value"}
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["layout"]["from"] == "file" and recipe["recipe"]["sites"] == recipe["layout"]["sha256"]
    assert findings(out) == findings(out, against=source) == []
    assert b.convert(source, out, calibration="none", sites=given).reused
    with pytest.raises(BismoothError, match="sites: .* there, None now"):
        b.convert(source, out, calibration="none")


def test_given_sites_take_the_place_of_the_table(make_checkpoint, tmp_path):
    source = make_checkpoint("llama")
    given = fewer_sites(source, tmp_path / "sites.json", "mlp.up_proj")
    outcome = b.convert(source, tmp_path / "out", calibration="none", sites=given)
    assert not any("down" in site["site"] for sites in outcome.sites.values() for site in sites)
    assert findings(tmp_path / "out", against=source) == []


def test_all_given_sites_are_those_of_the_table(make_checkpoint, tmp_path, calibration_text):
    """Then the tensors are the same, bit for bit."""
    source, file = make_checkpoint("qwen2_moe"), tmp_path / "sites.json"
    file.write_text(json.dumps(b.sites(source).record.to_json()))
    for name, sites in {"table": None, "given": file}.items():
        b.convert(source, tmp_path / name, calibration=calibration_text, calibration_tokens=256, sites=sites)
    one, other = digests(tmp_path / "table"), digests(tmp_path / "given")
    shards = [name for name in one if str(name).endswith(".safetensors")]
    assert shards and all(one[name] == other[name] for name in shards)


def test_given_sites_that_do_not_hold_are_refused(make_checkpoint, tmp_path):
    source, file = make_checkpoint(TYPE), tmp_path / "sites.json"
    record = b.sites(source).record.to_json()
    record["templates"][0]["sites"][-1]["offset"] = 1.0
    file.write_text(json.dumps(record))
    for options in ((), ("--dry-run",)):
        code, text = run("convert", source, tmp_path / "out", "--calibration", "none", "--sites", file, *options)
        assert code == 2 and "does not keep what block 0 computes: its output changes by" in text
    assert not (tmp_path / "out").exists()


def test_parts_are_merged_with_the_sites_that_were_given(make_checkpoint, tmp_path):
    source, text = make_checkpoint(TYPE), {"calibration": "none"}
    given = fewer_sites(source, tmp_path / "sites.json")
    for name, blocks in {"a": "0:1", "b": "1:3"}.items():
        b.convert(source, tmp_path / name, blocks=blocks, sites=given, **text)
    b.convert(source, tmp_path / "c", blocks="1:3", **text)
    with pytest.raises(BismoothError, match="of another conversion"):
        b.merge(tmp_path / "mixed", [tmp_path / "a", tmp_path / "c"])
    b.merge(tmp_path / "merged", [tmp_path / "a", tmp_path / "b"])
    b.convert(source, tmp_path / "whole", sites=given, **text)
    assert digests(tmp_path / "merged") == digests(tmp_path / "whole")
    assert findings(tmp_path / "merged", against=source) == []


def unknown(source: Path, **changes) -> Path:
    edit_json(source / "config.json", lambda config: config.update(model_type="no-such", **changes))
    return source


@pytest.mark.parametrize("options", [{}, {"method": "rtn"}, {"method": "mixed", "group_size": 32}])
def test_types_that_nobody_knows_are_rounded(make_checkpoint, tmp_path, options):
    """With a warning where smoothing was asked for."""
    source, out = unknown(make_checkpoint(TYPE)), tmp_path / "out"
    outcome = b.convert(source, out, **options)
    assert len(outcome.linears) == 12 and not any(outcome.sites.values())
    warned = any("become INT8 without smoothing" in note and "--method rtn" in note for note in outcome.notes)
    assert warned is not options.get("method")
    assert layout_of(out)["from"] == "names"
    assert findings(out) == findings(out, against=source) == []
    assert b.convert(source, out, **options).reused


def test_types_that_nobody_knows_are_inspected(make_checkpoint):
    found = b.inspect(unknown(make_checkpoint(TYPE)))
    assert not found.problems and found.known_by == "names" and "unknown to transformers" in found.unproven
    assert len(found.kinds) == 1 and len(found.kinds[0].linears) == 4 and found.sizes["blocks"] == 3


@pytest.mark.parametrize(
    ("model_type", "key", "remove", "parts"),
    [
        ("no-such", "num_hidden_layers", False, ["gpt_neox.layers.3.*", "is missing", "num_hidden_layers = 4"]),
        ("no-such", "num_hidden_layers", True, ["gpt_neox.layers.2.*", "belong to no block", "num_hidden_layers = 2"]),
        ("gpt2", "n_layer", False, ["transformer.h.3.*", "1 whole block is missing", "set n_layer to 3"]),
        ("gpt2", "n_layer", True, ["transformer.h.2.*", "belong to no block", "n_layer = 2"]),
    ],
)
def test_another_number_of_blocks_than_the_config_says(make_checkpoint, tmp_path, model_type, key, remove, parts):
    source = make_checkpoint("gpt2" if model_type == "gpt2" else TYPE)
    edit_json(source / "config.json", lambda c: c.update({"model_type": model_type, key: 2 if remove else 4}))
    code, text = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and all(part in text for part in parts), text


@pytest.mark.parametrize("method", ["rtn", "bismooth"])
def test_known_types_of_which_no_model_is_built(make_checkpoint, tmp_path, method):
    """vLLM would build none either."""
    source, out = make_checkpoint(TYPE), tmp_path / "out"
    edit_json(source / "config.json", lambda config: config.update(hidden_act="no-such-function"))
    code, text = run("convert", source, out, "--method", method)
    assert code == 2 and "no-such-function" in text and "mend it, or upgrade transformers" in text and not out.exists()
    assert b.inspect(source).problems


def test_types_of_which_no_small_model_runs(make_checkpoint, tmp_path, monkeypatch):
    """The message names what failed and how to go on, which then works, and says that it is a guess."""
    source, out = make_checkpoint(TYPE), tmp_path / "out"
    edit_json(source / "config.json", lambda config: config.update(initializer_range=0.125))  # not found out before

    def fail(*_):
        raise RuntimeError("no kernel for that")

    monkeypatch.setattr(instance, "small", fail)
    code, text = run("convert", source, out)
    assert code == 2 and "no kernel for that" in text and "--method rtn" in text and not out.exists()
    assert "no kernel for that" in b.inspect(source).unproven
    guessed = "what its blocks hold is guessed by names and shapes"
    assert any(guessed in note for note in b.convert(source, out, method="rtn").notes)
    assert findings(out) == findings(out, against=source) == []


@pytest.mark.parametrize("method", ["rtn", "bismooth"])
@pytest.mark.parametrize(
    "changes", [dict(num_hidden_layers=10**9), dict(hidden_size=2**40), dict(model_type=["x"]), dict(model_type=None)]
)
def test_absurd_configs_are_refused_whatever_the_method(make_checkpoint, tmp_path, method, changes):
    source = make_checkpoint(TYPE)
    edit_json(source / "config.json", lambda config: config.update(changes))
    code, text = run("convert", source, tmp_path / "out", "--method", method)
    assert code == 2 and "config.json" in text and "also:" not in text and not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_class", own.CLASSES)
def test_own_code_runs_only_if_it_may(tmp_path, calibration_text, model_class):
    source = own.write(tmp_path / "source", model_class)
    code, text = run("convert", source, tmp_path / "rtn")
    assert code == 0 and "does not run without --trust-remote-code" in text and "become INT8 without smoothing" in text
    assert layout_of(tmp_path / "rtn")["from"] == "names"
    trusted = {"trust_remote_code": True}
    found = b.inspect(source, **trusted)
    assert found.known_by == "discovery" and [len(kind.sites) for kind in found.kinds] == [2]
    assert b.sites(source, **trusted).kinds == found.kinds
    outcome = b.convert(source, tmp_path / "out", calibration=calibration_text, calibration_tokens=256, **trusted)
    assert len(outcome.linears) == 4 and all(len(sites) == 2 for sites in outcome.sites.values())
    assert (tmp_path / "out" / "modeling_own.py").is_file()
    assert findings(tmp_path / "out", against=source, **trusted) == []
    checked = b.verify(tmp_path / "out", against=source, engine=False)
    assert checked.ok and any("could not be found again" in note for note in checked.notes), checked.findings
    assert run("analyze", source, "--trust-remote-code", "--json")[0] == 0


@pytest.mark.parametrize("model_class", own.CLASSES)
def test_what_own_code_computes_is_measured(tmp_path, calibration_text, model_class):
    """Calibration sees the hidden states that the model itself has, buffers that are in no checkpoint included."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from vllm_w8a8_bismooth.checkpoint.basis import Means
    from vllm_w8a8_bismooth.measure.calibration import Calibration
    from vllm_w8a8_bismooth.method.rows import Threads

    folder = own.write(tmp_path / "source", model_class)
    source, tokens = Source(folder, Means(trusted=True)), torch.arange(2, 34).view(2, 16)
    calibration = Calibration(source, tokens, torch.device("cpu"))
    with Threads() as threads:
        for index in range(len(source.layers)):
            tensors = {name: source.checkpoint.read(source.names.block(index) + name) for name in source.blocks[index]}
            calibration.advance(index, tensors, threads)
    # not by from_pretrained, which loses buffers that code without a rule for them makes in its constructors
    model = AutoModelForCausalLM.from_config(own.load_config(folder), trust_remote_code=True).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    last = [module for name, module in model.named_modules() if name.endswith("stack.1")][0]
    seen = []
    last.register_forward_hook(lambda module, inputs, out: seen.append(out))
    with torch.no_grad():
        model(tokens)
    torch.testing.assert_close(calibration.hidden, seen[0])


def test_types_that_transformers_has_need_no_trust(make_checkpoint, tmp_path):
    """Even if the config names code, which does not run then, whether it may or not."""
    source = make_checkpoint(TYPE)
    (source / "evil.py").write_text("raise SystemExit('it ran')")
    edit_json(source / "config.json", lambda c: c.update(auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"}))
    outcome = b.convert(source, tmp_path / "out", calibration="none")
    assert outcome.sites and layout_of(tmp_path / "out")["from"] == "discovery"
    assert run("sites", source, "--trust-remote-code")[0] == 0
