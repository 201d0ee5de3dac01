"""Commands of ``bismooth``, one after the other in one process:
``python -m tests.support.workers.commands COMMANDS.json ANSWERS.json``.

COMMANDS is name -> words. ANSWERS is name -> exit ``code``, and what was written to ``stdout`` and to ``stderr``.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

from vllm_w8a8_bismooth.cli.main import main


def run(words: list[str]) -> dict:
    out, err, code = io.StringIO(), io.StringIO(), None
    sys.argv = ["bismooth", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    return {"code": code or 0, "stdout": out.getvalue(), "stderr": err.getvalue()}


if __name__ == "__main__":
    commands, answers = map(Path, sys.argv[1:])
    answers.write_text(json.dumps({name: run(words) for name, words in json.loads(commands.read_text()).items()}))
