"""Lines to be copied: what the command proposes runs in a shell as it stands, however folders are called."""

import re
import subprocess

import pytest

from tests.support.command import run
from vllm_w8a8_bismooth.report.names import in_few_words
from vllm_w8a8_bismooth.shell import word

ODD = ["it's a model", "-model", "a [b] :bear: $HOME `c`", "ünïcode & more"]


def proposed(text: str) -> str:
    """The command in the last line."""
    (line,) = re.findall(r"(?:Next.*: |^ +)(bismooth (?:convert|inspect) .*)$", text, re.MULTILINE)
    return line


def in_a_shell(line: str) -> tuple[int, str]:
    """Runs a command as a shell reads it, in this process."""
    script = f"bismooth() {{ printf '%s\\0' \"$@\"; }}\n{line}"
    heard = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return run(*heard.stdout.split("\0")[:-1])


@pytest.mark.parametrize("name", ODD)
def test_the_source_is_one_word(make_checkpoint, tmp_path, monkeypatch, name):
    make_checkpoint().rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    code, text = run("inspect", "--", name)
    assert code == 0
    code, text = in_a_shell(f"{proposed(text)} --method rtn")
    assert code == 0 and (tmp_path / f"{name}-int8" / "config.json").exists(), text
    code, text = run("analyze", "--", name)
    assert code == 0
    code, text = in_a_shell(proposed(text).replace("text.txt", "none"))
    assert code == 0 and (tmp_path / "DST" / "config.json").exists(), text
    (tmp_path / name / "config.json").write_text("{}")
    code, text = run("inspect", "--", name)
    code, text = in_a_shell(proposed(text))
    assert code == 2 and "Next, once that is mended: " in text


GIVEN = {
    "--calibration bundled": ["--calibration", "bundled"],
    "--calibration 'my text.txt' --calibration ./-a": ["--calibration", "my text.txt", "--calibration=-a"],
    "--calibration text.txt": ["--calibration", "none"],
}


@pytest.mark.parametrize("words", GIVEN)
def test_analyze_proposes_the_text_that_it_was_given(make_checkpoint, tmp_path, monkeypatch, calibration_text, words):
    monkeypatch.chdir(tmp_path)
    for name in ("my text.txt", "-a"):
        (tmp_path / name).write_bytes(calibration_text.read_bytes())
    code, text = run("analyze", make_checkpoint(), *GIVEN[words])
    assert code == 0 and f" DST {words}\n" in text, text


def test_parts_are_words(make_checkpoint, tmp_path, monkeypatch):
    source = make_checkpoint()
    monkeypatch.chdir(tmp_path)
    lines = []
    for name, blocks in (("it's a", "0:2"), ("-b", "2:3")):
        code, text = run("convert", "--method", "rtn", "--blocks", blocks, "--", source, name)
        assert code == 0
        (words,) = re.findall(r"bismooth merge DST (.*) \.\.\.$", text, re.MULTILINE)
        lines.append(words)
    assert in_a_shell(f"bismooth merge DST {' '.join(lines)}")[0] == 0


def test_word():
    assert [word(text) for text in ("a", "a b", "-a", "-a b", "")] == ["a", "'a b'", "./-a", "'./-a b'", "''"]


def test_many_names_in_few_words():
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in (0, 1, 2, 9) for j in range(3)]
    assert in_few_words([*names, "lm_head", "model.layers.4.input_layernorm"]) == (
        "experts.*.up_proj in blocks 0-2, 9; lm_head; input_layernorm in block 4"
    )
    assert in_few_words([]) == ""
    alike = [f"model.layers.{i}.mlp.{name}_proj" for i in (0, 3) for name in ("up", "gate")]
    assert in_few_words([*alike, "layers.0.mlp.down_proj"]) == "up_proj, gate_proj in blocks 0, 3; down_proj in block 0"


def test_reasons_against_tensor_parallelism_are_few(make_checkpoint):
    code, text = run("inspect", make_checkpoint(), "--group-size", "32")
    reasons = [line for line in text.splitlines() if line.startswith("  no on ")]
    assert code == 0 and 1 <= len(reasons) <= 6 and len(set(reasons)) == len(reasons)
    assert "  no on 8, 16: num_attention_heads = 4 is not a multiple of the ranks" in reasons, reasons
