"""Calibration text as people have it: what is read, what of it is used, what is refused, and that memory is bounded."""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import AutoTokenizer

from tests.support.command import json_of, patience, run
from tests.support.damage import edit_json
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure import corpus, json_rows
from vllm_w8a8_bismooth.measure.documents import Chat, Unusable, document
from vllm_w8a8_bismooth.measure.text import CalibrationText, read_text, sample

ROOT = Path(__file__).parents[2]


def said(text: CalibrationText) -> list[str]:
    """Every document of a text, chats as their contents."""
    found = []
    for read in text.files:
        if read.corpus.kind == corpus.PLAIN:
            found.append("".join(read.corpus.text(7)))
        else:
            usable = (document(row) for _, row in read.corpus.rows() if not isinstance(row, Unusable))
            found += [d.plain() if isinstance(d, Chat) else d for d in usable if not isinstance(d, Unusable)]
    return found


A, B = {"text": "one"}, {"text": "two é"}
FILES = {
    "plain": ("a.txt", b"one\r\ntwo \xc3\xa9", ["one\r\ntwo é"]),
    "plain with a byte order mark": ("a.txt", b"\xef\xbb\xbfone", ["one"]),
    "JSON in plain text": ("a.txt", b'{"text": "one"}', ['{"text": "one"}']),
    "markdown": ("a.md", b"# one\n", ["# one\n"]),
    "source code": ("a.py", b"one = {}\n", ["one = {}\n"]),
    "text that begins like JSON": ("a.md", b'{ "not": json at all\n', ['{ "not": json at all\n']),
    "links in markdown": ("a.md", b"[one](two)\n", ["[one](two)\n"]),
    "no suffix": ("text", b"one", ["one"]),
    "rows without a suffix": ("rows", json.dumps(A).encode(), ["one"]),
    "a list without a suffix": ("rows", json.dumps([A, B]).encode(), ["one", "two é"]),
    "lines": ("a.jsonl", b'{"text": "one"}\n\n{"text": "two \xc3\xa9", "n": 1}', ["one", "two é"]),
    "lines with a byte order mark and CRLF": (
        "a.jsonl",
        b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "2"}\r\n',
        ["one", "2"],
    ),
    "another suffix for lines": ("a.ndjson", b'{"text": "one"}\n', ["one"]),
    "upper case": ("A.JSONL", b'{"text": "one"}\n', ["one"]),
    "plain in upper case": ("A.TXT", b"one", ["one"]),
    "a list": ("a.json", json.dumps([A, B]).encode(), ["one", "two é"]),
    "indented rows named jsonl": (
        "a.jsonl",
        "\n".join(json.dumps(row, indent=2) for row in (A, B)).encode(),
        ["one", "two é"],
    ),
    "a list over lines": ("a.json", json.dumps([A, B], indent=2).encode(), ["one", "two é"]),
    "a list of strings": ("a.json", b'["one", "two"]', ["one", "two"]),
    "a list named jsonl": ("a.jsonl", json.dumps([A, B]).encode(), ["one", "two é"]),
    "an object with a list": ("a.json", json.dumps({"version": 1, "data": [A, B]}).encode(), ["one", "two é"]),
    "one row": ("a.json", json.dumps({**A, "tags": ["x"]}).encode(), ["one"]),
    "one row over lines": ("a.json", json.dumps({**A, "tags": ["x"]}, indent=1).encode(), ["one"]),
    "lines named json": ("a.json", b'{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
    "tags before the text": ("a.json", json.dumps({"tags": ["x", "y"], **A}, indent=1).encode(), ["one"]),
    "a list of strings in an object": ("a.json", b'{"id": 1, "data": ["one", "two"]}', ["one", "two"]),
    "a list before the name of it": ("a.json", b'{"data": [{"text": "one"}],\n"text": "two"}', ["one", "two"]),
    "a chat a line": ("a.jsonl", b'[{"role": "user", "content": "1"}, {"role": "x", "content": "2"}]', ["1\n2"]),
    "a list of chats": ("a.json", b'[[{"from": "human", "value": "one"}]]', ["one"]),
    "nested keys": ("a.json", json.dumps([{"meta": {"text": "x"}, **A}]).encode(), ["one"]),
    "gzipped": ("a.txt.gz", gzip.compress(b"one", mtime=0), ["one"]),
    "gzipped lines": ("a.jsonl.GZ", gzip.compress(b'{"text": "one"}', mtime=0), ["one"]),
    "gzipped under another name": ("a.jsonl", gzip.compress(b'{"text": "one"}', mtime=0), ["one"]),
}


@pytest.mark.parametrize("case", FILES)
def test_files_are_read(tmp_path, case):
    name, data, documents = FILES[case]
    (tmp_path / name).write_bytes(data)
    text = read_text(tmp_path / name)
    assert said(text) == documents and said(text) == documents, "twice the same"
    assert text.name == name and text.files[0].skipped == 0


CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
ROWS = {
    "text": (A, "one"),
    "a string": ("one", "one"),
    "messages": ({"messages": CHAT}, "one\ntwo"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "1"}]}]}, "1"),
    "parts of other services": ({"messages": [{"role": "x", "content": [{"type": "input_text", "text": "1"}]}]}, "1"),
    "parts that are strings": ({"messages": [{"role": "x", "content": ["1", "2"]}]}, "1\n2"),
    "keys that are null": ({"messages": [{"role": None, "content": None, "from": "human", "value": "one"}]}, "one"),
    "lists in an object": ({"messages": {"role": ["user", "x"], "content": ["one", "two"]}}, "one\ntwo"),
    "a call of a tool": ({"messages": [*CHAT, {"role": "assistant", "content": None, "tool_calls": []}]}, "one\ntwo\n"),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]}, "one\ntwo"),
    "conversation": ({"conversation": CHAT}, "one\ntwo"),
    "prompt": ({"prompt": "one", "completion": "two"}, "one\ntwo"),
    "response": ({"prompt": "one", "response": "two"}, "one\ntwo"),
    "prompt of turns": ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "one\ntwo"),
    "Alpaca": ({"instruction": "one", "input": "in", "output": "two"}, "one\n\nin\ntwo"),
    "Alpaca without input": ({"instruction": "one", "input": "", "output": "two"}, "one\ntwo"),
    "Dolly": ({"instruction": "one", "context": "in", "response": "two"}, "one\n\nin\ntwo"),
    "OpenOrca": ({"system_prompt": "", "question": "one", "response": "two"}, "one\ntwo"),
    "input": ({"input": "one", "output": "two"}, "one\ntwo"),
    "question": ({"question": "one", "answer": "two"}, "one\ntwo"),
    "content": ({"content": "one"}, "one"),
    "text before others": ({"content": "no", "messages": CHAT, "text": "one"}, "one"),
    "no text, but a chat": ({"text": None, "messages": CHAT}, "one\ntwo"),
}
UNUSABLE = {
    "null": (None, "null, not an object"),
    "a number": (3, "a number, not an object"),
    "a list": ([A], "a list, not an object"),
    "an empty object": ({}, "none of the keys"),
    "other keys": ({"body": "one", "k" * 99: 1}, "none of the keys that are looked for, but 'body', 'kkk"),
    "null text": ({"text": None}, '"text" is null'),
    "empty text": ({"text": " \n"}, '"text" is empty'),
    "text of a number": ({"text": 3}, '"text" is a number'),
    "half a pair": ({"prompt": "one"}, '"prompt" lacks the key'),
    "a chat in a string": ({"messages": "[]"}, '"messages" is a string without turns'),
    "no turns": ({"messages": []}, '"messages" is a list without turns'),
    "turns of strings": ({"messages": ["one"]}, '"messages" is a list without turns'),
    "a turn without role": ({"messages": [{"content": "one"}]}, '"messages" is a list without turns'),
    "silent turns": ({"messages": [{"role": "user", "content": ""}]}, '"messages" is a list without turns'),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_are_understood(case):
    row, expected = ROWS[case]
    found = document(row)
    assert (found.plain() if isinstance(found, Chat) else found) == expected


@pytest.mark.parametrize("case", UNUSABLE)
def test_rows_that_hold_no_text(case):
    row, reason = UNUSABLE[case]
    found = document(row)
    assert isinstance(found, Unusable) and reason in found.reason


def test_roles_are_those_of_templates():
    turns = [{"from": name, "value": name} for name in ("system", "human", "gpt", "tool")]
    assert [turn["role"] for turn in document({"conversations": turns}).messages()] == [
        "system", "user", "assistant", "tool",
    ]  # fmt: skip


def test_bad_rows_are_skipped_and_told(make_checkpoint, tmp_path):
    source, path, out = make_checkpoint(), tmp_path / "rows.jsonl", tmp_path / "out"
    good = json.dumps({"text": "abcdefgh" * 40})
    path.write_text(f'{good}\n\n{{"text": null}}\n{{"text": "a\n{good}\n[]\n{"[" * 100000}\n')
    options = ("--calibration", path, "--calibration-tokens", "256")
    planned = run("convert", source, out, *options, "--dry-run")[1]
    code, message = run("convert", source, out, *options)
    assert (
        "Skipped 4 of 6" in planned
        and code == 0
        and 'Skipped 4 of 6 rows of calibration text (rows.jsonl line 3: "text" is null)' in message
    )
    found = json.loads((out / "report.json").read_text())["calibration"]
    assert {key: found[key] for key in ("files", "rows", "skipped", "documents", "windows", "tokens")} == {
        "files": ["rows.jsonl"], "rows": 2, "skipped": 4, "documents": 2, "windows": 2, "tokens": 256,
    }  # fmt: skip
    card = (out / "README.md").read_text()
    assert "`rows.jsonl`: 256 tokens in 2 windows, from 2 of 2 documents" in card and "4 rows that held no text" in card
    assert "nothing to do" in run("convert", source, out, *options)[1]


@pytest.mark.parametrize(
    ("data", "documents", "skipped"),
    [
        ('[{"text": "a"},\n{"text": },\n{"text": "b"}]', ["a", "b"], 1),
        ('[{"text": "a"}\n{"text": "b"}]', ["a", "b"], 0),
        ('[{"text": "a"}, nonsense', ["a"], 1),
        ('{"text": "a"}\n{"text": \n{"text": "b"}\n', ["a", "b"], 1),
        ('{"data": [{"text": "a"}', ["a"], 1),
        ('[1, null, {"text": "a"}, 12', ["a"], 4),
        ("[" * 100000 + '\n{"text": "a"}', ["a"], 1),
    ],
)
def test_broken_json_costs_no_more_than_its_row(tmp_path, data, documents, skipped):
    path = tmp_path / "a.json"
    path.write_text(data)
    text = read_text(path)
    assert said(text) == documents and text.files[0].skipped == skipped


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_rows_are_bounded(tmp_path, monkeypatch, name):
    """A row that is too long is skipped without being held; those behind it are read."""
    monkeypatch.setattr(json_rows, "LONGEST", 1000)
    monkeypatch.setattr(json_rows, "_PIECE", 64)
    rows = [{"text": "a" * 900}, {"text": "b" * 5000}, {"text": "c" * 900}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / name).write_text("[" + ",\n".join(lines) + "]" if name == "a.json" else "\n".join(lines))
    text = read_text(tmp_path / name)
    assert said(text) == ["a" * 900, "c" * 900] and "longer than 1000" in text.files[0].reason


def test_several_files_add_up(make_checkpoint, tmp_path):
    """In their order; the recipe has one SHA-256 of them, and the report has their names."""
    source, out = make_checkpoint(), tmp_path / "out"
    (tmp_path / "a.txt").write_text("a" * 300)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "b" * 300}))
    paths = tmp_path / "a.txt", tmp_path / "b.jsonl"
    options = [word for path in paths for word in ("--calibration", path)]
    assert run("convert", source, out, *options, "--calibration-tokens", "1000")[0] == 0
    assert run("convert", source, out, *options, "--calibration-tokens", "1000")[1].count("nothing to do")
    found = json.loads((out / "report.json").read_text())["calibration"]
    assert found["files"] == ["a.txt", "b.jsonl"] and found["documents"] == 2 and found["tokens"] == 4 * 128
    recipe = json.loads((out / "recipe.json").read_text())["recipe"]
    assert recipe["calibration"] == read_text(*paths).sha256 != read_text(*reversed(paths)).sha256
    code, message = run("convert", source, out, *options[2:], *options[:2], "--calibration-tokens", "1000")
    assert code == 2 and "calibration: " in message


def test_texts_in_memory(make_checkpoint, tmp_path):
    """As an iterable of strings, which may end only once."""
    text = read_text(document for document in ("one", "two é", " "))
    assert said(text) == ["one", "two é"] and text.files[0].skipped == 1
    assert text.sha256 == read_text(["one", "two é", " "]).sha256
    source = Checkpoint(make_checkpoint())
    assert sample(text, source, 100).tokens.numel() == len("onetwo é".encode())
    long = "".join(f"{i:07d}," for i in range(2**20 + 99))
    (tmp_path / "long.txt").write_text(long)
    tokens = [sample(read_text(given), source, 2000).tokens for given in ([long], tmp_path / "long.txt")]
    assert torch.equal(*tokens), "however long one is"
    with pytest.raises(BismoothError, match="no usable row.*is a number"):
        read_text([3])


def test_standard_input_and_pipes(make_checkpoint, tmp_path):
    """The same tokens as from a file of the same content."""
    data, source = "\n".join(json.dumps({"text": letter * 200}) for letter in "abc").encode(), make_checkpoint()
    (tmp_path / "rows.jsonl").write_bytes(data)
    expected = read_text(tmp_path / "rows.jsonl")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    piped = read_text(str(tmp_path / "pipe"))
    writer.join()
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(gzip.compress(data, mtime=0)))
    try:
        given = read_text("-")
    finally:
        sys.stdin = before
    assert given.name == "standard input" and piped.sha256 == expected.sha256
    for text in (piped, given):
        tokens = [sample(t, Checkpoint(source), 500).tokens for t in (text, expected)]
        assert torch.equal(*tokens)


def test_parquet_without_pyarrow(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1....PAR1")
    code, message = run("convert", make_checkpoint(), tmp_path / "out", "--calibration", path)
    assert code == 2 and "a.parquet: pyarrow is not installed" in message and "pip install pyarrow" in message


def test_parquet(tmp_path):
    rows = [{"messages": CHAT, "n": 1}] * 3 + [{"messages": None, "n": 2}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    text = read_text(tmp_path / "a.parquet")
    assert said(text) == ["one\ntwo"] * 3 and text.files[0].skipped == 1
    parquet.write_table(pyarrow.Table.from_pylist([{"body": "one"}]), tmp_path / "b.parquet")
    with pytest.raises(BismoothError, match="only the columns body; rename"):
        read_text(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(BismoothError, match="damaged Parquet"):
        read_text(tmp_path / "c.parquet")


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEMPLATES = {
    "a template": (TEMPLATE, "<user>one<assistant>two", 0, None),
    "a template with BOS": ("<s>" + TEMPLATE, "<s><user>one<assistant>two", 0, None),
    "a template with the date": ("{{ strftime_now('%d%Y') }}" + TEMPLATE, "262024<user>one<assistant>two", 0, None),
    "a template for parts": (
        "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
        "one\ntwo",
        1,
        "leaves out what is said",
    ),
    "a template that refuses": ("{{ raise_exception('no such role') }}", "one\ntwo", 1, "no such role"),
    "a template that is none": ("{% for %}", "one\ntwo", 1, ""),
    "no template": (None, "one\ntwo", 1, "the checkpoint has none"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_chats_go_through_the_checkpoints_template(make_checkpoint, tmp_path, case):
    template, expected, refused, reason = TEMPLATES[case]
    source, path = make_checkpoint(), tmp_path / "chats.jsonl"
    (source / "chat_template.jinja").unlink()
    if template is not None:
        (source / "chat_template.jinja").write_text(template)
    path.write_text(json.dumps({"messages": CHAT}))
    found = sample(read_text(path), Checkpoint(source), 100)  # the tokenizer has no line ends
    words = AutoTokenizer.from_pretrained(source).convert_ids_to_tokens(found.tokens.flatten().tolist())
    assert "".join(words).replace("</s>", "\n") == expected and found.used.plain_chats == refused
    assert (found.used.template is None) == (reason is None) and (reason or "") in (found.used.template or "")
    assert len(found.used.remarks()) == refused


def test_only_chosen_pieces_of_chats_are_rendered(make_checkpoint, tmp_path, monkeypatch):
    """And what a long chat becomes is spread like any text."""
    source, path = make_checkpoint(), tmp_path / "chats.jsonl"
    (source / "chat_template.jinja").write_text(TEMPLATE)
    long = {"messages": [{"role": "user", "content": f"{i:07d}," * 20} for i in range(500)]}
    path.write_text("\n".join([json.dumps({"messages": CHAT})] * 2000 + [json.dumps(long)]))
    calls = []
    kind = type(AutoTokenizer.from_pretrained(source))
    render = kind.apply_chat_template
    monkeypatch.setattr(kind, "apply_chat_template", lambda *a, **k: calls.append(1) or render(*a, **k))
    found = sample(read_text(path), Checkpoint(source), 512)
    assert found.tokens.shape == (4, 128) and 1 < len(calls) < 250
    assert 1 < found.used.documents < len(calls), "those that the windows hold"


def test_lone_surrogates_are_no_fault_of_the_tokenizer(make_checkpoint, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\\ud800b"}')
    assert sample(read_text(path), Checkpoint(make_checkpoint()), 100).tokens.shape == (1, 3)


def test_windows_beyond_the_embedding_are_left_out(make_checkpoint, tmp_path):
    """Added tokens that the embedding lacks, in a few windows: the others serve. In most: it is another model's."""
    source, path, out = make_checkpoint(), tmp_path / "a.txt", tmp_path / "out"
    added = {"id": 160, "content": "<|new|>", "special": True}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    edit_json(source / "tokenizer.json", lambda t: t["added_tokens"].append(added))
    path.write_text("a" * 1000 + "<|new|>" + "b" * 1000)
    code, message = run("convert", source, out, "--calibration", path)
    assert code == 0 and "Left out 1 windows with token ids that the embedding lacks" in message
    found = json.loads((out / "report.json").read_text())["calibration"]
    assert found["left_out"] == 1 and found["windows"] == 14
    path.write_text(("a" * 50 + "<|new|>") * 40)
    code, message = run("convert", source, tmp_path / "other", "--calibration", path)
    assert code == 2 and "gives id 160" in message and "of 15 windows" in message and "--calibration none" in message


def zipped(name: str, data: bytes) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return file.getvalue()


REFUSED = {
    "a table by columns": (
        "a.json",
        b'{"columns": ["text"], "index": [0, 1], "data": [["one"], ["two"]]}',
        ["as pandas splits it", "orient='records'"],
    ),
    "UTF-16": ("a.txt", "one".encode("utf-16"), ["a.txt: not UTF-8, but UTF-16;", "it: iconv -f UTF-16 -t UTF-8 "]),
    "a PDF": ("a.txt", b"%PDF-1.4\n\xff", ["a.txt: a formatted document", "save it as .txt"]),
    "a document": ("a.docx", b"PK\x03\x04....", ["a.docx: a formatted document"]),
    "Latin-1 far inside": ("a.txt", b"x" * 2**20 + b"\xc3\xa9\xe9", ["not UTF-8 (byte 1048578)", "iconv -c -f UTF-8"]),
    "Latin-1 lines": ("a.jsonl", b'{"text": "caf\xe9"}', ["not UTF-8 (byte 13)", "iconv -f LATIN1"]),
    "half a character": ("a.txt", b"one \xc3", ["not UTF-8 (byte 4)"]),
    "binary": ("model.bin", b"\0\1\2" * 9, ["model.bin: no text (it holds zero bytes)", "--calibration none"]),
    "zstd": ("a.jsonl.zst", b"(\xb5/\xfd....", ["only gzip", "zstd -dc "]),
    "bzip2": ("a.txt.bz2", b"BZh9....", ["only gzip", "bzip2 -dc "]),
    "zip": ("a.zip", b"PK\x03\x04....", ["only gzip", "funzip "]),
    "damaged gzip": ("a.txt.gz", gzip.compress(b"one" * 99, mtime=0)[:-9], ["a damaged gzip file", "again"]),
    "no Parquet": ("a.parquet", b"PAR2", ["a.parquet: no Parquet file"]),
    "a table": ("a.csv", b"text\none\n", ["a.csv: a table", "csv.DictReader"]),
    "only bad rows": (
        "a.jsonl",
        b'hello\n{"text": ""}\n',
        ["no usable row (a.jsonl line 1: no valid JSON)", '"messages"'],
    ),
    "keys of others": ("a.jsonl", b'{"body": "x"}\n', ["no usable row (a.jsonl line 1: none of the keys", "'body'"]),
    "an empty list": ("a.json", b"[]", ["a.json", "is empty", "--calibration none"]),
    "only a number": ("a.json", b"3", ["no usable row"]),
    "no rows": ("a.jsonl", b"\n\n", ["a.jsonl", "is empty"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_are_refused(make_checkpoint, tmp_path, case):
    name, data, parts = REFUSED[case]
    (tmp_path / name).write_bytes(data)
    code, message = run("convert", make_checkpoint(), tmp_path / "out", "--calibration", tmp_path / name)
    assert code == 2 and all(part in message for part in parts), message
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("it's a table.csv", b'\xef\xbb\xbftext,n\r\none,1\r\n"two,\nthree",2\r\n'),
        ("a.tsv", b'text\tn\none\t1\n"two,\nthree"\t2\n'),
        ("b.csv", b"id;text\n1;one, two\n2;two\n"),
        ("c.csv", b"id\ttext\n1\tone\n"),
        ("d.tsv", b"text|n\none|1\n"),
        ("e.csv", b'"a;b;c;d",text\n1,one\n'),
        ("a.CSV.gz", gzip.compress(b"text\none\n", mtime=0)),
        ("a.txt", "one, two".encode("utf-16")),
        ("a.txt", "one, two".encode("utf-32")),
        ("a.txt", "one, two\r\n".encode("utf-16-le")),
        ("a.txt", "one, two\r\n".encode("utf-16-be")),
        ("a.txt", b"one \x93two\x94"),
        ("a.txt.gz", gzip.compress(gzip.compress(b"one", mtime=0), mtime=0)),
        ("a.jsonl.bz2.gz", gzip.compress(bz2.compress(b'{"text": "one"}'), mtime=0)),
        ("a b.txt", b"one, \xe9"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one \xe9"}', mtime=0)),
        ("a.md", b"one \xc3\xa9 \xe9 two"),
        ("a.jsonl.bz2", bz2.compress(b'{"text": "one"}')),
        ("a.txt.xz", lzma.compress(b"one")),
        ("a", bz2.compress(b"one")),
        ("a.zip", zipped("inside.jsonl", b'{"text": "one"}')),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # archives hold the time: workers would not agree
)
def test_remedies_work(tmp_path, name, data):
    """The command that a message names is run as it stands, and what it writes is read."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BismoothError) as refused:
        read_text(tmp_path / name)
    command = refused.value.problems[0].remedy.partition(": ")[2].partition(" (columns")[0]
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"{command.split()[0]} is not installed")
    subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path)
    (made,) = {p.name for p in tmp_path.iterdir()} - {name}
    assert " ".join(said(read_text(tmp_path / made))).startswith("one")


UNKNOWN = {
    "CP1251": "один, два, три",
    "KOI8-R": "one один",
    "GB18030": "one 一二三",
    "SHIFT_JIS": "テスト one",
    "EUC-KR": "하나 둘",
    "CP1250": "one gąska i źrebię",
}


@pytest.mark.parametrize("coding", UNKNOWN)
def test_an_encoding_that_cannot_be_told(tmp_path, coding):
    """Latin-1 would read it, without a word, as other letters. Once it is named, the command works."""
    (tmp_path / "a.txt").write_bytes(UNKNOWN[coding].encode(coding))
    with pytest.raises(BismoothError, match="its encoding cannot be told") as refused:
        read_text(tmp_path / "a.txt")
    remedy = refused.value.problems[0].remedy
    assert "LATIN1" not in remedy and "1252" not in remedy
    command = remedy.partition(": ")[2].replace("ENCODING", coding)
    subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path)
    assert said(read_text(tmp_path / "a-utf8.txt")) == [UNKNOWN[coding]]


WESTERN = [
    "L'été dernier, où étais-tu ? Ça va.",
    "Das ist die Übergröße der schönen Schuhe",
    "¿Qué tal, mañana será otro día?",
    "a naïve café",
    "Så är det på ön i dag, sade han",
]


@pytest.mark.parametrize("coding", ["LATIN1", "CP1252"])
@pytest.mark.parametrize("text", WESTERN)
def test_western_encodings_are_told(tmp_path, coding, text):
    text = f"He said “{text}”" if coding == "CP1252" else text
    (tmp_path / "a.txt").write_bytes(text.encode(coding))
    with pytest.raises(BismoothError, match=f"convert it: iconv -f {coding}"):
        read_text(tmp_path / "a.txt")


def test_folders_and_data_sets(tmp_path):
    with pytest.raises(BismoothError, match="none of its files is known to be text; give a file"):
        read_text(tmp_path)
    for name in ("a.txt", "b.jsonl.gz", "c.JSON", "d.parquet", "e.bin"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        BismoothError, match=r"a folder; name its files: --calibration .*a\.txt .*c\.JSON \(and 1 more\)"
    ):
        read_text(tmp_path)
    with pytest.raises(BismoothError, match=r"to_json\(\"text.jsonl\"\)' HuggingFaceH4/ultrachat_200k"):
        read_text("HuggingFaceH4/ultrachat_200k")


def test_none_stands_alone(make_checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text("one")
    options = ("--calibration", "none", "--calibration", tmp_path / "a.txt")
    code, message = run("convert", make_checkpoint(), tmp_path / "out", *options)
    assert code == 2 and "--calibration none" in message and "leave out one of the two" in message
    assert run("convert", tmp_path / "source", tmp_path / "out", *options[:2] * 2, "--dry-run")[0] == 0


def test_what_is_piped_in_is_given_once(make_checkpoint, tmp_path):
    code, message = run("convert", make_checkpoint(), tmp_path / "out", *("--calibration", "-") * 2)
    assert code == 2 and "--calibration -: given twice" in message


def test_text_that_changes_meanwhile(make_checkpoint, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    text = read_text(path)
    path.write_text("three")
    with pytest.raises(BismoothError, match="changed meanwhile"):
        sample(text, Checkpoint(make_checkpoint()), 100)


def test_analyze_reads_the_same(make_checkpoint, tmp_path):
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([{"messages": CHAT}] * 60 + [{}]))
    code, out = run("analyze", make_checkpoint(), "--calibration", path, "--calibration-tokens", "256", "--json")
    assert code == 0
    found = json_of(out)["calibration"]
    assert found["files"] == ["chats.json"] and found["skipped"] == 1 and found["windows"] == 2


@settings(max_examples=60)
@given(data=st.data())
def test_mutated_files(tmp_path_factory, data):
    """Read or refused with one message, in little time."""
    name = data.draw(st.sampled_from(["a.json", "a.jsonl", "a", "a.txt.gz"]))
    rows = [{"messages": CHAT}, A, {"prompt": "one", "completion": "two"}, B]
    base = json.dumps(rows, indent=data.draw(st.sampled_from([None, 1]))) if name != "a.jsonl" else ""
    base = (base or "\n".join(map(json.dumps, rows))).encode()
    base = bytearray(gzip.compress(base, mtime=0) if name.endswith(".gz") else base)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(base)))
        base[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=6))
    path = tmp_path_factory.mktemp("mutated") / name
    path.write_bytes(base)
    try:
        with patience(20):
            text = read_text(path)
            assert len(said(text)) == text.files[0].rows > 0
    except BismoothError as error:
        assert len(error.problems) == 1


KINDS = {
    "lines": ("big.jsonl", '{"text": "', '"}\n', '{"text": "', '"}\n'),
    "one line of plain text": ("big.txt", "", "", "", ""),
    "a list on one line": ("big.json", '[{"text": "', '"}, {"text": "', "", '"}]'),
}


@pytest.mark.parametrize("case", KINDS)
def test_memory_is_bounded(make_checkpoint, tmp_path, case):
    """60 MB of text take less than 25 MB: in a process of its own, of which nothing else counts."""
    name, first, between, _, last = KINDS[case]
    word = "abcdefgh" * 1250
    with open(tmp_path / name, "w") as file:
        for i in range(6000):
            file.write((first if not i or case == "lines" else "") + word + (between if i < 5999 else last))
    assert (tmp_path / name).stat().st_size >= 6e7
    (tmp_path / "small.jsonl").write_text(json.dumps({"text": word}))
    script = (
        "import resource, sys\n"
        "from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint\n"
        "from vllm_w8a8_bismooth.measure.text import read_text, sample\n"
        "source, small, big = sys.argv[1:]\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "sample(read_text(small), Checkpoint(source), 1000)\n"
        "before = peak()\n"
        "found = sample(read_text(big), Checkpoint(source), 1000)\n"
        "print(peak() - before, found.tokens.shape[0])"
    )
    arguments = [make_checkpoint(), tmp_path / "small.jsonl", tmp_path / name]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT)
    grown, windows = map(int, done.stdout.split())
    assert windows == 7 and grown < 25e6, done.stderr
