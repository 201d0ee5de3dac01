"""What models write runs in a sandbox; its figures are those of answers whose outcome is known."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import real, tables
from benchmarks.real import agreement, generate, humaneval, jail, sandbox, tasks
from benchmarks.real.generate import Answer
from benchmarks.real.sandbox import FAILED, LATE, PASSED
from benchmarks.real.weights import folder_of

PROBLEM = humaneval.Problem(
    task_id="test/0",
    prompt='import math\n\n\ndef area(r: float) -> float:\n    """ Of a circle.\n    >>> area(0)\n    0.0\n    """\n',
    entry_point="area",
    canonical_solution="    return math.pi * r * r\n",
    test="def check(candidate):\n    assert candidate(0) == 0.0\n    assert round(candidate(1), 2) == 3.14\n",
)
RIGHT = "    return math.pi * r**2"


@pytest.mark.parametrize(
    "program",
    [
        "pass",
        "print('x' * 10**8)",  # nobody reads it
        "import collections, dataclasses, decimal, heapq, itertools, math, random, re, typing",
        "import hashlib\nassert hashlib.md5(b'').hexdigest()[:4] == 'd41d'",
        "assert len('\u00e9') == 1",
        "import threading\nassert threading.current_thread().name == 'MainThread'",
        "import os, sys\nassert 'PATH' not in os.environ and not os.listdir() and len(sys.argv) == 1",
        "assert __name__ == 'program'",
    ],
)
def test_programs_that_pass(program):
    assert sandbox.run(program) == PASSED


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "def f(:",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os; os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL); os.abort()",
        "import os\nwhile True:\n    os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.execv('/bin/true', ['true'])",
        "x = [0] * 2**28",  # 2 GiB
        "x = 'x'\nwhile True:\n    x += x",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import ctypes; ctypes.CDLL(None)",
        "def f(): return f()\nf()",
        "input()",
        "import numpy",
        "open('here', 'w')",
    ],
)
def test_programs_that_do_not_reach_their_end(program):
    assert sandbox.run(program) == FAILED


def test_what_a_program_does_to_files_stays_undone(tmp_path):
    """By whatever way, even if it goes on after it was refused."""
    kept, folder = tmp_path / "kept", tmp_path / "folder"
    kept.write_text("kept")
    folder.mkdir()
    ways = (
        f"open({str(kept)!r}, 'w')",
        f"open({str(tmp_path / 'new')!r}, 'x')",
        f"os.remove({str(kept)!r})",
        f"os.truncate({str(kept)!r}, 0)",
        f"os.open({str(kept)!r}, os.O_RDWR | os.O_TRUNC)",
        f"os.rename({str(kept)!r}, {str(folder / 'kept')!r})",
        f"shutil.rmtree({str(folder)!r})",
        f"pathlib.Path({str(tmp_path / 'new')!r}).touch()",
        f"os.mkdir({str(tmp_path / 'new')!r})",
    )
    each = "".join(f"try:\n    {way}\n    done += 1\nexcept OSError:\n    pass\n" for way in ways)
    assert sandbox.run(f"import os, pathlib, shutil\ndone = 0\n{each}assert not done") == PASSED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "kept"] and kept.read_text() == "kept"


@pytest.mark.parametrize(
    "loop", ["while True:\n    pass", "while True:\n    try:\n        1 / 0\n    except:\n        0"]
)
def test_endless_loops_end(loop):
    assert sandbox.run(loop, seconds=1) == LATE


def test_one_that_sleeps_ends_and_leaves_nothing():
    started = time.monotonic()
    assert sandbox.run("import time\ntime.sleep(123456)", patience=2) == LATE
    assert time.monotonic() - started < 20
    assert not [line for line in map(_command, Path("/proc").glob("[0-9]*")) if str(sandbox._JAIL) in line]


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""  # it ended


def test_without_namespaces_the_rest_holds(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: "limits only")
    assert sandbox.run("pass") == PASSED
    for program in ("import sys; sys.exit(0)", "import os; os.fork()", "open('x', 'w')", "x = [0] * 2**28"):
        assert sandbox.run(program) == FAILED
    assert sandbox.run("while True: pass", seconds=1) == LATE


@pytest.mark.skipif(sandbox.isolation() != "namespaces", reason="this user can have no namespaces")
def test_namespaces_hold_without_the_hook(tmp_path, monkeypatch):
    """The hook is one line of defence: what lies behind it is tried by a jail that has none."""
    jail_without = tmp_path / "jail.py"
    source = Path(jail.__file__).read_text()
    assert "    sys.addaudithook(refuse)\n" in source
    jail_without.write_text(source.replace("    sys.addaudithook(refuse)\n", ""))
    monkeypatch.setattr(sandbox, "_JAIL", jail_without)
    assert sandbox.run(f"import os\nos.kill({os.getpid()}, 0)") == FAILED  # it has no such number in there
    assert sandbox.run(f"open({str(tmp_path / 'new')!r}, 'w')") == FAILED and not (tmp_path / "new").exists()
    assert sandbox.run("import os; os.listdir()") == PASSED
    interfaces = "import socket; assert [name for _, name in socket.if_nameindex()] == ['lo']"
    assert sandbox.run(interfaces) == PASSED
    if os.geteuid():
        assert sandbox.run("import os; os.fork()") == FAILED


def test_programs_are_run_in_their_order():
    assert sandbox.run_all(["pass", "assert False", "pass", "1 / 0"]) == [PASSED, FAILED, PASSED, FAILED]


def test_a_machine_on_which_nothing_runs_is_no_result(monkeypatch):
    monkeypatch.setattr(sandbox, "_JAIL", Path("missing.py"))
    with pytest.raises(RuntimeError, match="no program runs in the sandbox here"):
        sandbox.run_all(["pass"])


@pytest.mark.parametrize(
    "answer, verdict",
    [
        (RIGHT, PASSED),
        (RIGHT + "\n\n", PASSED),
        (PROBLEM.canonical_solution, PASSED),
        ("    return math.pi * r", PASSED),  # these tests cannot know
        ("    return r * r", FAILED),
        ("    import sys\n    sys.exit(0)", FAILED),
        ("    pass\ndef check(f):\n    pass\n", FAILED),
        ("    Sorry, I cannot do that.", FAILED),
        ("    return math.pi * (r", FAILED),  # cut off
        ("", FAILED),
        ("\0" + RIGHT, FAILED),
    ],
)
def test_answers_are_judged(answer, verdict):
    assert sandbox.run(PROBLEM.program(answer)) == verdict


@pytest.mark.network
def test_an_answer_is_begun_for_the_model():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder_of(real.QWEN))
    request = PROBLEM.request(tokenizer)
    text = tokenizer.decode(request.prompt)
    assert text.count('"""\n```<|im_end|>') == 1 or text.count('"""\n```\n<|im_end|>') == 1
    assert text.endswith('    0.0\n    """\n') and text.count("def area(r: float) -> float:") == 2


@pytest.mark.slow
@pytest.mark.network
def test_the_tests_of_all_problems_know_right_from_wrong():
    """The problems' own solutions pass, all of them, and none does that returns nothing."""
    problems = humaneval.problems()
    right = sandbox.run_all([p.program(p.canonical_solution) for p in problems])
    wrong = sandbox.run_all([p.program("    return None") for p in problems])
    assert len(problems) == 164 and set(right) == {PASSED} and set(wrong) == {FAILED}


def test_pass_rates_are_compared_problem_by_problem():
    reference = [True] * 60 + [False] * 40
    same = tasks.judged(reference, reference)
    assert same["pass1"] == 0.6 and same["recovery"] == 1 and same["difference_interval"] == (0, 0)
    assert same["passed"] == "1" * 60 + "0" * 40
    low, high = same["pass1_interval"]
    assert low == pytest.approx(0.6 - 1.96 * 0.049, abs=0.01) and high == pytest.approx(0.6 + 1.96 * 0.049, abs=0.01)
    other = tasks.judged(reference, [False] * 12 + [True] * 50 + [False] * 38)
    assert (other["lost"], other["gained"], other["difference"]) == (12, 2, pytest.approx(-0.10))
    assert other["recovery"] == pytest.approx(50 / 60)
    # The spread of a mean of 100 values, of which 12 are -1, 2 are 1 and the others 0.
    low, high = other["difference_interval"]
    assert high - low == pytest.approx(2 * 1.96 * np.std([-1] * 12 + [1] * 2 + [0] * 86) / 10, rel=0.05)
    assert tasks.judged([False] * 4, [True] * 4)["recovery"] is None


def test_answers_agree_until_the_first_token_that_differs():
    answers = [Answer("", tokens, True) for tokens in ([1, 2, 3], [1, 2, 3, 4], [5, 6], [], [7])]
    others = [Answer("", tokens, True) for tokens in ([1, 9, 3], [1, 2, 3], [5, 6], [], [8])]
    found = agreement.agreement(answers, others)
    assert found.lengths == [1, 3, 2, 0, 0] and found.whole == 2 / 5
    assert found.mean == pytest.approx(6 / 5) and found.median == 1
    assert found.mean_interval[0] < found.mean < found.mean_interval[1]


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_the_common_part_is_common_and_no_longer_one_is(one, other):
    n = agreement.common(one, other)
    assert one[:n] == other[:n] and agreement.common(other, one) == n
    assert n == min(len(one), len(other)) or one[n] != other[n]


@pytest.mark.engine
@pytest.mark.slow
def test_greedy_answers_come_in_the_order_of_their_requests(tmp_path):
    """On a test bed, whose words do not depend on which requests are given first, and end where they are to end."""
    from benchmarks.testbed import PYTHON

    tokens = np.load(PYTHON.folder / "heldout.npy").astype(int).tolist()
    requests = [generate.Request(tokens[i * 40 : i * 40 + 8 + i], 4 + i) for i in range(6)]
    first = generate.generate(PYTHON.model, requests, tmp_path / "log", dtype="float32")
    again = generate.generate(PYTHON.model, requests, tmp_path / "log", order=1, dtype="float32")
    assert first == again and [len(a.tokens) for a in first if not a.ended] == [
        r.most for r, a in zip(requests, first, strict=True) if not a.ended
    ]
    longest = max(first, key=lambda answer: len(answer.text))
    word = longest.text[len(longest.text) // 2 :][:2]
    stopped = [generate.Request(requests[first.index(longest)].prompt, 20, (word,))]
    (answer,) = generate.generate(PYTHON.model, stopped, tmp_path / "log", dtype="float32")
    assert answer.ended and answer.text == longest.text[: longest.text.index(word)]


def test_an_arm_is_converted_and_answered_once(tmp_path, monkeypatch):
    """What is kept is used: no engine is started by a second run, and another arm can be added."""
    monkeypatch.setattr(tasks, "folder_of", lambda model: tmp_path / "source")
    run = tasks.Run("smollm2-135m", tmp_path)
    made = []
    arm = tasks.Arm(lambda source, folder: (made.append(source), folder.mkdir()))
    assert run.checkpoint("RTN", arm) == run.checkpoint("RTN", arm) == tmp_path / "smollm2-135m/RTN/checkpoint"
    assert made == [tmp_path / "source"]
    kept = {"commit": "c", "seconds": {"convert": 1, "answer": 2}, "answers": [vars(Answer("a", [1], True))]}
    (tmp_path / "smollm2-135m/RTN/humaneval.json").write_text(json.dumps(kept))
    assert run.answers("RTN", arm, "humaneval", list).answers == [Answer("a", [1], True)]


def test_the_peer_is_an_arm_only_where_there_is_one():
    names = set(tasks.arms("smollm2-135m", "python"))
    assert names - set(tasks.arms("smollm2-135m", None)) == {"SmoothQuant", "planted SmoothQuant"}
    assert next(iter(tasks.arms("smollm2-135m", None))) == "bf16"


def test_tables_compare_with_full_precision(tmp_path):
    reference, other = [True] * 50 + [False] * 50, [True] * 47 + [False] * 50 + [True] * 3
    answers = [[Answer("", [1, 2, n], True) for n in numbers] for numbers in ((3, 4), (3, 5))]
    rows = []
    for arm, passed, mine in zip(("bf16", "RTN"), (reference, other), answers, strict=True):
        rows.append({"task": "humaneval", "arm": arm, "cut": 1, **tasks.judged(reference, passed)})
        figures = vars(agreement.agreement(answers[0], mine))
        rows.append({"task": "agreement", "arm": arm, "tokens": 3.0, **figures})
    (tmp_path / "tasks.json").write_text(json.dumps({"rows": rows}))
    *_, full, rtn = tables.humaneval(tmp_path / "tasks.json").splitlines()
    low, high = rows[2]["difference_interval"]
    assert full == "| bf16 | 50.0% |  | 100.0% | 0 | 0 | 1 |"
    assert rtn == f"| RTN | 50.0% | +0.0 ({100 * low:+.1f} to {100 * high:+.1f}) | 100.0% | 3 | 3 | 1 |"
    *_, rule, rtn = tables.agreement(tmp_path / "tasks.json").splitlines()
    assert rule.startswith("|---") and rtn == "| RTN | 2 (2 to 3) | 2 | 50.0% | 3 |"
