"""What the card says of the original: its licence, its place on the Hub, and what it is for."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.support.command import json_of, run
from tests.support.contents import digests
from tests.support.conversion import convert
from tests.support.damage import edit_json
from vllm_w8a8_bismooth.checkpoint import hub
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.report import card, licence
from vllm_w8a8_bismooth.report.labels import Labels
from vllm_w8a8_bismooth.report.task import task_of

RTN = Recipe.of("rtn")
APACHE = (Path(__file__).parents[2] / "LICENSE").read_text()
MIT = """MIT License

Copyright (c) 2025 Somebody, Inc. and others

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""
TEXTS = {
    "mit": ({"LICENSE": MIT}, "mit"),
    "mit, another title": ({"LICENSE.md": MIT.replace("MIT License", "# The MIT License (MIT)")}, "mit"),
    "apache": ({"LICENSE.txt": APACHE, "NOTICE": "By us."}, "apache-2.0"),
    "apache with an owner": (
        {"LICENSE": APACHE.replace("Copyright [yyyy] [name of copyright owner]", "Copyright 2024 Alibaba Cloud")},
        "apache-2.0",
    ),
    "SPDX and text": ({"LICENSE": "SPDX-License-Identifier: MIT\n" + MIT}, "mit"),
    "SPDX alone": ({"LICENSE": "// SPDX-License-Identifier: BSD-3-Clause\n"}, "bsd-3-clause"),
    "only a title": ({"LICENSE": "Apache License\nVersion 2.0, January 2004\n"}, None),
    "a condition added": ({"LICENSE": MIT + "\nNon-commercial use only.\n"}, None),
    "a condition on the owner's line": ({"LICENSE": MIT.replace("and others", "for research use only")}, None),
    "a condition before it": ({"LICENSE": "Modified " + MIT}, None),
    "a word changed": ({"LICENSE": APACHE.replace("irrevocable", "revocable", 1)}, None),
    "SPDX contradicts": ({"LICENSE": "SPDX-License-Identifier: GPL-3.0-only\n" + MIT}, None),
    "SPDX unknown": ({"LICENSE": "SPDX-License-Identifier: LicenseRef-Ours\n" + MIT}, None),
    "SPDX and another text": ({"LICENSE": "SPDX-License-Identifier: MIT\nBut not on Sundays.\n"}, None),
    "two licences": ({"LICENSE": MIT, "LICENSE-MODEL": "Pay me."}, None),
    "too long": ({"LICENSE": MIT + " " * 2**17}, None),
    "none": ({"USE_POLICY.md": "Be kind."}, None),
}


@pytest.mark.parametrize("case", TEXTS)
def test_only_a_text_that_leaves_no_doubt_is_a_licence(tmp_path, case):
    files, found = TEXTS[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence.recognised(tmp_path) == found


@pytest.mark.parametrize(
    ("given", "found"),
    {
        "apache-2.0": "apache-2.0",
        "Apache-2.0": "apache-2.0",
        "GPL-3.0-or-later": "gpl-3.0",
        "LGPL-2.1-only": "lgpl-2.1",
        "AGPL-3.0-only": "agpl-3.0",
        "GPL-3.0+": "gpl-3.0",
        "GFDL-1.3-or-later": "gfdl",
        "llama3.1": "llama3.1",
        "other": "other",
    }.items(),
)
def test_licences_become_those_of_the_hub(given, found):
    assert Labels(license=given).license == found


NO_LICENCES = [
    *("apache", "Apache 2.0", "", "MIT OR Apache-2.0", "mit\n---"),
    *("mit-only", "apache-2.0-or-later", "Apache-2.0+", "gpl-only", "gfdl-only", "GPL-3.0-only-or-later"),
]


@pytest.mark.parametrize("given", NO_LICENCES)
def test_other_licences_are_refused(given):
    with pytest.raises(
        BismoothError, match="neither a licence id of the Hub nor.*repositories-licenses, or write other"
    ):
        Labels(license=given)


@pytest.mark.parametrize("given", ["name", "a/b/c", "org/name@main", "https://hf.co/org/name", "", "o/a--b", "o/n.git"])
def test_other_names_are_refused(given):
    with pytest.raises(BismoothError, match="not the name of a model on the Hub; write org/name"):
        Labels(base_model=given)


def data(folder: Path) -> dict:
    """The front matter of a folder's card, as the Hub's library reads it."""
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_labels_are_in_the_card_and_nowhere_else(make_checkpoint, tmp_path):
    source = make_checkpoint(num_hidden_layers=1)
    code, said = run("convert", source, tmp_path / "bare", "--method", "rtn")
    hint = "The card names no licence and no base model; the same command with --license ID --base-model ORG/NAME adds"
    assert code == 0 and hint in said
    assert not {"license", "base_model", "base_model_relation"} & data(tmp_path / "bare").keys()
    options = ("--base-model", "meta-llama/Meta-Llama-3-70B", "--license", "llama3")
    code, said = run("convert", source, tmp_path / "out", "--method", "rtn", *options)
    assert code == 0 and "The card names no" not in said
    found = data(tmp_path / "out")
    assert (found["license"], found["base_model"]) == ("llama3", "meta-llama/Meta-Llama-3-70B")
    assert found["base_model_relation"] == "quantized"
    text = (tmp_path / "out" / "README.md").read_text()
    assert "[meta-llama/Meta-Llama-3-70B](https://huggingface.co/meta-llama/Meta-Llama-3-70B), converted" in text
    bare, out = digests(tmp_path / "bare"), digests(tmp_path / "out")
    assert {file for file in bare if bare[file] != out[file]} == {"README.md"}


def test_a_licence_that_labels_cannot_have_is_not_called_absent(make_checkpoint, tmp_path):
    source = make_checkpoint(num_hidden_layers=1)
    (source / "README.md").write_text("---\nlicense: my-own\n---\n")
    code, said = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 0 and data(tmp_path / "out")["license"] == "my-own"
    assert "The card names no base model; the same command with --base-model ORG/NAME adds it" in said
    readme = tmp_path / "out" / "README.md"
    readme.write_text(readme.read_text().replace("license: my-own", "license: my own\nbase_model: [org/a, org/b]"))
    assert card.missing(tmp_path / "out") == {}


def test_another_label_rewrites_the_card_of_a_conversion_that_is_there(make_checkpoint, tmp_path):
    source, out = make_checkpoint(num_hidden_layers=1), tmp_path / "out"
    convert(source, tmp_path / "at once", RTN, labels=Labels("org/name", "mit"))
    command = ("convert", source, out, "--method", "rtn")
    assert run(*command)[0] == 0
    before = digests(out)
    code, said = run(*command, "--license", "MIT", "--dry-run")
    assert code == 0 and "already holds this conversion; its card would be rewritten (license: mit)." in said
    assert "Nothing was written" in said and digests(out) == before
    code, said = run(*command, "--license", "MIT", "--dry-run", "--json")
    assert json.loads(said)["relabelled"] == {"base_model": None, "license": "mit"}
    code, said = run(*command, "--license", "MIT")
    assert code == 0 and "already holds this conversion; its card was rewritten (license: mit)" in said
    code, said = run(*command, "--base-model", "org/name", "--json")
    assert code == 0 and json.loads(said)["labels"] == {"base_model": "org/name", "license": "mit"}
    assert digests(out) == digests(tmp_path / "at once")
    for options in ((), ("--license", "mit")):
        for dry in ((), ("--dry-run",)):
            code, said = run(*command, *options, *dry)
            assert code == 0 and "nothing to do" in said and "Nothing was written" not in said
    assert json_of(run(*command, "--dry-run", "--json")[1])["relabelled"] is None
    assert digests(out) == digests(tmp_path / "at once")
    (out / "README.md").unlink()
    assert "its card would be rewritten.\n" in run(*command, "--dry-run")[1]
    assert run(*command, "--license", "mit", "--base-model", "org/name")[0] == 0
    assert digests(out) == digests(tmp_path / "at once")


def test_what_somebody_wrote_into_the_card_is_kept(make_checkpoint, tmp_path):
    source, out = make_checkpoint(num_hidden_layers=1), tmp_path / "out"
    convert(source, out, RTN)
    readme = out / "README.md"
    readme.write_text(readme.read_text() + "\nMine.\n")
    before = digests(out)
    for dry in (("--dry-run",), ()):
        code, said = run("convert", source, out, "--method", "rtn", "--license", "mit", *dry)
        assert code == 2 and "would be lost; have it say license: mit between its first two lines of ---" in said
    assert digests(out) == before
    readme.write_text(readme.read_text().replace("---\n", "---\nlicense: mit\n", 1))  # as it says
    code, said = run("convert", source, out, "--method", "rtn", "--license", "mit")
    assert code == 0 and "nothing to do" in said and readme.read_text().endswith("Mine.\n")


def test_an_interrupted_conversion_goes_on_with_other_labels(make_checkpoint, tmp_path):
    source, out = make_checkpoint(), tmp_path / "out"

    def interrupted(stage, done, total, written):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, RTN, progress=interrupted)
    done = convert(source, out, RTN, labels=Labels(license="mit"))
    assert done.resumed and done.labels == Labels(license="mit") and data(out)["license"] == "mit"


def test_merged_parts_have_labels(make_checkpoint, tmp_path):
    source = make_checkpoint(num_hidden_layers=2)
    (source / "LICENSE").write_text(MIT)
    parts = [tmp_path / "0", tmp_path / "1"]
    code, said = run("convert", source, parts[0], "--blocks", "0:1", "--license", "mit")
    assert code == 2 and "a part has no card, --license has no effect; give it to bismooth merge" in said
    for index, part in enumerate(parts):
        convert(source, part, RTN, blocks=slice(index, index + 1))
    code, said = run("merge", tmp_path / "out", *parts, "--base-model", "org/name")
    assert code == 0 and (data(tmp_path / "out")["base_model"], data(tmp_path / "out")["license"]) == (
        "org/name",
        "mit",
    )
    convert(source, tmp_path / "whole", RTN, labels=Labels("org/name"))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    again, before = ("merge", tmp_path / "out", *parts, "--license", "apache-2.0"), digests(tmp_path / "out")
    code, said = run(*again, "--dry-run")
    says = "its card would be rewritten (base_model: org/name, license: apache-2.0)"
    assert code == 0 and says in said and "Nothing was written" in said and digests(tmp_path / "out") == before
    found = json_of(run(*again, "--dry-run", "--json")[1])
    assert found["reused"] and found["relabelled"] == {"base_model": "org/name", "license": "apache-2.0"}
    card_before = (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "out" / "README.md").write_text(card_before + "\nMine.\n")
    for dry in (("--dry-run",), ()):
        code, said = run(*again, *dry)
        assert code == 2 and "would be lost" in said
    (tmp_path / "out" / "README.md").write_text(card_before)
    code, said = run(*again)
    assert code == 0 and "its card was rewritten (base_model: org/name, license: apache-2.0)" in said


NAMED = """---
license: other
license_name: ours
license_link: LICENSE
language: en
base_model: somebody/else
---
"""


@pytest.mark.parametrize(
    ("given", "terms"),
    [
        (None, {"license": "other", "license_name": "ours", "license_link": "LICENSE"}),
        ("other", {"license": "other", "license_name": "ours", "license_link": "LICENSE"}),
        ("gemma", {"license": "gemma"}),
    ],
)
def test_a_licence_keeps_its_own_name_and_link(make_checkpoint, tmp_path, given, terms):
    source = make_checkpoint(num_hidden_layers=1)
    (source / "README.md").write_text(NAMED)
    (source / "LICENSE").write_text(MIT)  # of the code, perhaps: the card is the publisher's word
    convert(source, tmp_path / "out", RTN, labels=Labels(license=given))
    found = data(tmp_path / "out")
    assert {key: value for key, value in found.items() if key.startswith("license")} == terms
    assert found["language"] == "en" and "base_model" not in found


def test_a_folder_in_the_hubs_cache_says_what_it_is(make_checkpoint, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--some-org--a.name" / "snapshots" / commit
    folder.parent.mkdir(parents=True)
    shutil.move(make_checkpoint(num_hidden_layers=1), folder)
    found = hub.find(str(folder))
    assert (
        (found.hub_id, found.revision)
        == ("some-org/a.name", commit)
        == (
            hub.cached(str(folder)).hub_id,
            hub.cached(str(folder)).revision,
        )
    )
    assert run("convert", folder, tmp_path / "out", "--method", "rtn")[0] == 0
    assert data(tmp_path / "out")["base_model"] == "some-org/a.name"


TASKS = {
    "language model": (["LlamaForCausalLM"], False, "text-generation", ""),
    "GPT's way of saying it": (["LlamaLMHeadModel"], False, "text-generation", ""),
    "embedding": (["Qwen3Model"], False, "feature-extraction", " --runner pooling"),
    "sentence-transformers": (["Qwen3ForCausalLM"], True, "sentence-similarity", " --runner pooling"),
    "classifier": (["Qwen3ForSequenceClassification"], True, "text-classification", " --runner pooling"),
    "another": (["Qwen3ForTokenClassification"], False, None, ""),
    "two": (["LlamaForCausalLM", "LlamaModel"], False, None, ""),
    "none": (None, False, None, ""),
    "nonsense": ([{"a": 1}], False, None, ""),
}


@pytest.mark.parametrize("case", TASKS)
def test_what_a_checkpoint_is_for(tmp_path, case):
    names, modules, pipeline, runner = TASKS[case]
    (tmp_path / "config.json").write_text(json.dumps({"architectures": names} if names else {}))
    if modules:
        (tmp_path / "modules.json").write_text("[]")
    found = task_of(tmp_path)
    assert (found.pipeline, found.runner) == (pipeline, runner)
    assert ("sentence-transformers" in found.tags) == (case == "sentence-transformers")


def test_the_card_of_an_embedding_model(make_checkpoint, tmp_path):
    source, out = make_checkpoint(num_hidden_layers=1), tmp_path / "out"
    (source / "modules.json").write_text("[]")
    code, said = run("convert", source, out, "--method", "rtn")
    assert code == 0 and f"      vllm serve {out} --runner pooling\n" in said
    found = data(out)
    assert found["pipeline_tag"] == "sentence-similarity" and "sentence-transformers" in found["tags"]
    assert "\nvllm serve PATH_TO_THIS_FOLDER --runner pooling\n" in (out / "README.md").read_text()


def test_calibration_that_the_report_tells_is_in_the_card(make_checkpoint, tmp_path):
    out = tmp_path / "out"
    convert(make_checkpoint(num_hidden_layers=1), out, RTN)
    used = {"files": ["a.jsonl", "b`.txt"], "rows": 7, "documents": 5, "windows": 3, "tokens": 999, "skipped": 2}
    edit_json(out / "report.json", lambda report: report.update(calibration={**used, "compute_dtype": "bfloat16"}))
    said = "`a.jsonl`, `b_.txt`: 999 tokens in 3 windows, from 5 of 7 documents, computed in bfloat16. 2 rows that held"
    assert said in card.draw_up(out, Labels())


def test_tables_have_as_many_cells_in_every_row(make_checkpoint, tmp_path):
    convert(make_checkpoint(), tmp_path / "out", Recipe.of("mixed", group_size=32, group_layers="down"))
    lines = (tmp_path / "out" / "README.md").read_text().splitlines()
    tables = [i for i, line in enumerate(lines) if line.startswith("|---")]
    assert len(tables) == 3
    for start in tables:
        assert lines[start - 2] == "" and lines[start - 1].startswith("|")
        rows = [lines[start - 1]]
        for line in lines[start:]:
            if not line.startswith("|"):
                assert line == ""
                break
            rows.append(line)
        assert len({row.count("|") for row in rows}) == 1 and len(rows) > 5
    text = "\n".join(lines)
    assert "\n```\npip install .\n```\n" in text and "vllm serve PATH_TO_THIS_FOLDER\n" in text
