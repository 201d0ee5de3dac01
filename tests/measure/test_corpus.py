"""Files of calibration text that are odd in themselves."""

import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure import json_rows, text
from vllm_w8a8_bismooth.measure.text import read_text

ROOT = Path(__file__).parents[2]


def read(path, **columns):
    """How many rows of a Parquet file are used, how many skipped, and why."""
    parquet.write_table(pyarrow.table(columns), path)
    (found,) = read_text(path).files
    return found.rows, found.skipped, found.reason or ""


def test_a_row_of_parquet_costs_no_more_than_itself(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, pyarrow.array([b"a", b"b\xff", b"c"]).buffers())
    rows, skipped, reason = read(path, text=broken)
    assert (rows, skipped) == (2, 1) and reason.startswith("a.parquet row 2: cannot be read ('utf-8'")
    monkeypatch.setattr(text, "LONGEST", 1000)
    assert read(path, text=["x" * 1001, "y" * 1000]) == (1, 1, "a.parquet row 1: longer than 1000 characters")


def test_columns_of_one_name(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(BismoothError, match="several columns of one name; rename"):
        read_text(tmp_path / "a.parquet")


def test_memory_for_parquet_is_that_of_some_rows(tmp_path):
    """Also where all rows are one group: four times the file takes no more."""
    grown = []
    for rows in (3000, 12000):
        path = tmp_path / "a.parquet"
        table = pyarrow.table({"text": ["abcdefgh" * 2500] * rows})
        parquet.write_table(table, path, row_group_size=rows, use_dictionary=False, compression="none")
        script = (
            "import resource, sys, pyarrow.parquet\n"
            "from vllm_w8a8_bismooth.measure.text import read_text\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
            "before = peak(); read_text(sys.argv[1]); print(peak() - before)"
        )
        done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, cwd=ROOT)
        grown.append(int(done.stdout))
    assert grown[1] < grown[0] + 9e7 < 3 * 6e7 + 9e7


def test_lists_before_the_text_are_bounded(tmp_path, monkeypatch):
    """Those too long to be kept are rows, and the text behind them is one, too."""
    monkeypatch.setattr(json_rows, "LONGEST", 1000)
    (tmp_path / "a.json").write_text('{"tags": [' + '"x", ' * 99 + '"y"],\n "text": "one"}')
    assert read_text(tmp_path / "a.json").files[0].rows == 101


def test_pipes_of_a_shell_have_no_number_for_a_name(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with open(tmp_path / "a.txt") as file:
        assert read_text(f"/dev/fd/{file.fileno()}").name == "a pipe"


def test_closed_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(BismoothError, match="-: the calibration file is empty"):
        read_text("-")
