import json
import subprocess
import sys

import pytest

from benchmarks.soak import GROWTH, NEAR, Answer, Tally

TRUTH = Answer([7, 8, 9], [{7: -0.1, 3: -2.0}, {8: -1.0, 4: -1.1}, {9: -0.5}])


@pytest.mark.parametrize(
    ("tokens", "changes", "verdict"),
    [
        ([7, 8, 9], {}, "same"),
        ([7, 8, 9], {1: {8: -1.0 - 0.9 * NEAR}}, "same"),
        ([7, 8, 9], {1: {8: -1.0 - 1.1 * NEAR}}, "wrong"),
        ([7, 4, 0], {1: {4: -1.0}, 2: {0: -0.1}}, "near-tie"),  # what follows is another text
        ([3, 8, 9], {0: {3: -0.1}}, "wrong"),
        ([7, 8, 5], {2: {5: -0.1}}, "wrong"),  # not even among the best
    ],
)
def test_answers_are_judged(tokens, changes, verdict):
    tally = Tally()
    tally.judge(TRUTH, Answer(tokens, [changes.get(step, best) for step, best in enumerate(TRUTH.best)]))
    assert tally.answers == {verdict: 1} and bool(tally.unlike) == (verdict == "wrong")


@pytest.mark.engine
@pytest.mark.parametrize(
    ("seconds", "streams"), [(12, 16), pytest.param(300, 64, marks=pytest.mark.soak)], ids=["short", "long"]
)
def test_a_server_under_load(tmp_path, seconds, streams):
    """Clients that stream, hang up and send nonsense: no wrong answer, no error, no server that is gone."""
    command = [sys.executable, "-m", "benchmarks.soak", "--seconds", str(seconds), "--streams", str(streams)]
    done = subprocess.run([*command, "--json", str(tmp_path / "soak.json")], capture_output=True, text=True)
    assert (tmp_path / "soak.json").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    (row,) = json.loads((tmp_path / "soak.json").read_text())["rows"]
    assert row["wrong"] == [] and row["errors"] == [] and row["afterwards"]["wrong"] == []
    assert all(row["answers"].get(kind, 0) > 0 for kind in ("same", "cancelled", "refused"))
    assert row["memory"]["growth"] <= GROWTH and done.returncode == 0
