"""What several files of this room make."""

import pytest


@pytest.fixture
def make(make_checkpoint):
    """A checkpoint of one file."""
    return lambda *arguments, **changes: make_checkpoint(*arguments, sharded=False, **changes)
