"""The command in this process."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

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
