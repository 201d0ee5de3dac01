"""Functions called in a process of their own, whose modules and environment no other test meets."""

import importlib
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any


@contextmanager
def process(module: str, **environment: str) -> Iterator[Callable]:
    """``call(name, *arguments)`` runs a function of a module in one process, started with these variables."""
    with ProcessPoolExecutor(1, get_context("spawn"), _prepare, (environment,)) as pool:
        # Pickled here, because torch would hand tensors over as shared memory.
        yield lambda name, *arguments: pickle.loads(pool.submit(_call, module, name, pickle.dumps(arguments)).result())


def _prepare(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def _call(module: str, name: str, arguments: bytes) -> bytes:
    result: Any = getattr(importlib.import_module(module), name)(*pickle.loads(arguments))
    return pickle.dumps(result)
