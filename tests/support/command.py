"""The command in this process."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from vllm_w8a8_bismooth.cli import main
from vllm_w8a8_bismooth.errors import BismoothError


@contextmanager
def patience(seconds: int) -> Iterator[None]:
    """Turns a hang into a failure."""

    def give_up(*_):
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(*arguments) -> tuple[int, str]:
    """Exit code and message of the command, in this process."""
    try:
        with patience(60):
            result = CliRunner().invoke(main.app, [str(a) for a in arguments], catch_exceptions=False)
    except TimeoutError:  # an OSError, but not one of the user's
        raise AssertionError(f"hangs: {arguments}") from None
    except (BismoothError, OSError) as error:  # as main catches them
        return 2, str(error)
    return result.exit_code, result.output


def json_of(said: str) -> Any:
    """The JSON in what a command says, behind what progress does."""
    return json.JSONDecoder().raw_decode(said, said.index("{"))[0]


def refused(source: Path, tmp_path: Path, *parts: str) -> None:
    """Converts in vain, for one reason, which is said with these words."""
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and all(part in message for part in parts), message
    assert message.count("also:") == 0, "one sentence says it"
    assert not (tmp_path / "out").exists()


def converted(source: Path, out: Path, *options: str) -> str:
    """Converts, and returns what is said."""
    code, message = run("convert", source, out, *(options or ("--method", "rtn")))
    assert code == 0, message
    return message
