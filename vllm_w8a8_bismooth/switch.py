"""The one variable that says who may serve: ``BISMOOTH_KERNELS``, read when a process first needs to know."""

import os

VARIABLE = "BISMOOTH_KERNELS"
AUTO, ON, OFF = "auto", "on", "off"


def wanted() -> str:
    """What the environment asks for; :data:`AUTO` if nothing.

    :data:`AUTO`: on a GPU, compiled kernels serve what they passed a self-test of; on a CPU, they serve. :data:`ON`:
    they serve without. :data:`OFF`: they serve nothing.

    Raises:
        ValueError: it is none of the three.
    """
    value = os.environ.get(VARIABLE) or AUTO
    if value not in (AUTO, ON, OFF):
        raise ValueError(f"{VARIABLE}={value!r} is unknown; expected {AUTO}, {ON} or {OFF}")
    return value
