"""`bismooth sites`, and what `bismooth inspect` says of where a layout is from."""

import json
from pathlib import Path

import pytest

import vllm_w8a8_bismooth as b
from tests.support.command import json_of, run
from tests.support.damage import edit_json
from tests.support.models import tiny_config
from vllm_w8a8_bismooth.discovery.reading import read


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def make_config(tmp_path: Path):
    """Writes the config.json of a small model of some type, without any weights."""

    def make(model_type: str = "gpt_neox", **changes) -> Path:
        file = tmp_path / "model" / "config.json"
        file.parent.mkdir()
        config = tiny_config(model_type, **changes).to_dict()
        file.write_text(json.dumps({**config, "model_type": model_type}))
        return file

    return make


def record_of(source: Path, *options) -> dict:
    """What is printed for programs, behind what progress says."""
    code, text = run("sites", source, "--json", *options)
    assert code == 0, text
    return json_of(text)


def test_people_read_it(make_config):
    code, text = run("sites", make_config())
    assert code == 0
    for part in (
        "gpt_neox, 3 blocks",
        "blocks 0-2\n",
        "INT8: attention.dense 64 x 64, attention.query_key_value 192 x 64",
        "norm->query_key_value",
        "rows 32-47, 80-95 and 2 more runs of 192",
        "discover: 3 of 3 blocks",
        "Proven on 3 blocks with widths divided by",
        "3 seeds and texts of 32 and 23 tokens",
        "A conversion goes by this.",
    ):
        assert part in text, text


def test_kinds_of_blocks_and_what_stays_in_float_are_shown(make_config):
    code, text = run("sites", make_config("qwen2_moe").parent)
    assert code == 0
    assert "block 0\n" in text and "blocks 1-2, 4 experts" in text and "experts.up->down" in text
    assert "float: mlp.gate, mlp.shared_expert_gate (a router or gate" in text


def test_the_record_is_what_the_option_takes(make_config, tmp_path):
    source, out = make_config(), tmp_path / "sites.json"
    record = record_of(source)
    assert record["model_type"] == "gpt_neox" and read(record) == b.sites(str(source)).record
    code, text = run("sites", source, "-o", out)
    assert code == 0 and json.loads(out.read_text()) == record
    assert f"Next: bismooth convert SRC DST --sites {out}" in text
    code, text = run("sites", source, "-o", out)
    assert code == 2 and "sites.json: exists" in text
    edit_json(out, lambda r: r["templates"][0].update(sites=r["templates"][0]["sites"][:1]))
    edited = record_of(source, "--sites", out)
    assert len(edited["templates"][0]["sites"]) == 1 < len(record["templates"][0]["sites"])
    assert "This is the given record." in run("sites", source, "--sites", out)[1]


def spoil(record: dict) -> None:
    record["templates"][0]["sites"][-1]["offset"] = 1.0


GIVEN = {
    "a site that does not hold": (spoil, ["does not keep what block 0 computes", "of its size", "take the site out"]),
    "another type": (lambda r: r.update(model_type="opt"), ["not of this model", "model_type is opt"]),
    "no record": (lambda r: r.pop("templates"), ["holds no record of sites", "templates"]),
}


@pytest.mark.parametrize("case", GIVEN)
def test_records_that_are_refused(make_config, tmp_path, case):
    source, file = make_config(), tmp_path / "sites.json"
    record = record_of(source)
    change, parts = GIVEN[case]
    change(record)
    file.write_text(json.dumps(record))
    code, text = run("sites", source, "--sites", file)
    assert code == 2 and all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "holds a JSON list"),
        (b"{}", "holds no record of sites"),
        (b"\xff", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b'{"a":' * 5000, "not valid JSON"),
        (b" " * (2**24 + 1), "larger than 16 MiB"),
    ],
)
def test_files_that_are_no_records(make_config, tmp_path, content, part):
    (tmp_path / "sites.json").write_bytes(content)
    code, text = run("sites", make_config(), "--sites", tmp_path / "sites.json")
    assert code == 2 and part in text and "sites.json" in text and "bismooth sites --json" in text, text
    code, text = run("sites", tmp_path / "model", "--sites", tmp_path / "nowhere.json")
    assert code == 2 and "nowhere.json: not found" in text


HOSTILE = {
    "blocks without end": (dict(num_hidden_layers=10**9), ["num_hidden_layers = 1000000000 is beyond what any model"]),
    "widths without end": (dict(hidden_size=2**40), ["hidden_size = 1099511627776 is beyond"]),
    "numbers of a thousand digits": (dict(intermediate_size=10**999), ["intermediate_size = a larger number"]),
    "a list for a type": (dict(model_type=["gpt_neox"]), ["model_type = ['gpt_neox'] is unknown"]),
    "a name without end": (dict(model_type="x" * 10**6), ["is unknown to transformers"]),
    "no type": (dict(model_type=None), ["model_type = None is unknown"]),
    "nested without end": (dict(rope_parameters=json.loads('{"a":' * 400 + "1" + "}" * 400)), ["nested more than 32"]),
    "lists without end": (dict(layer_types=["x"] * 10**5), ["layer_types has 100000 entries"]),
    "garbage": (dict(num_attention_heads={"a": [None]}, hidden_act=7), ["is no positive integer"]),
    "negative": (dict(num_hidden_layers=-4), ["num_hidden_layers = -4 is no positive integer"]),
    "an unknown type": (dict(model_type="no-such"), ["model_type = 'no-such' is unknown to transformers", "upgrade"]),
    "own code": (
        dict(model_type="no-such", auto_map={"AutoConfig": "evil.Config"}),
        ["code of the model's own, which does not run without --trust-remote-code", "--trust-remote-code"],
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_configs_of_no_model_are_refused_with_one_message(make_config, case):
    source = make_config()
    changes, parts = HOSTILE[case]
    edit_json(source, lambda config: config.update(changes))
    (source.parent / "evil.py").write_text("raise SystemExit('it ran')")
    code, text = run("sites", source)
    assert code == 2 and all(part in text for part in parts) and "also:" not in text, text[:1000]
    assert len(text) < 500


def inspected(source: Path, *options) -> tuple[int, str]:
    code, text = run("inspect", source, *options)
    return code, " ".join(text.split())


def test_inspect_says_where_the_layout_is_from(make_checkpoint):
    source = make_checkpoint("gpt_neox")
    code, text = inspected(source)
    assert code == 0
    assert "layout found out on a small model of its class, and proven: 3 sites in 1 kind of blocks" in text
    assert "norm->query_key_value" not in text
    assert "norm->query_key_value" in inspected(source, "--sites")[1]
    code, text = run("inspect", source, "--json")
    found = json_of(text)
    assert found["known_by"] == "discovery" and found["unproven"] is None
    (kind,) = found["kinds"]
    assert kind["blocks"] == [0, 1, 2] and len(kind["sites"]) == 3
    assert kind["sites"][0]["consumers"] == ["attention.dense"] and kind["floats"] == {}


def test_inspect_of_several_kinds_of_blocks(make_checkpoint):
    code, text = inspected(make_checkpoint("qwen2_moe"), "--sites")
    assert code == 0 and "found out on a small model of its class, and proven: 9 sites in 2 kinds of blocks" in text
    assert "blocks 1-2, 4 experts" in text and "mlp.experts.{}.up_proj" in text and "experts.0" not in text


def test_inspect_of_types_that_nobody_knows(make_checkpoint):
    source = make_checkpoint()
    edit_json(source / "config.json", lambda config: config.update(model_type="no-such"))
    code, text = inspected(source, "--sites")
    assert code == 0 and "layout guessed by names and shapes, without sites" in text
    assert "model_type = 'no-such' is unknown to transformers" in text and "no sites" in text
    assert text.endswith("--method rtn") or "--method rtn" in text.partition("Next: bismooth convert")[2]
