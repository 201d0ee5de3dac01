"""Whether the sites by which a checkpoint was converted are those that its model has, as far as that is known today."""

from pathlib import Path

from vllm_w8a8_bismooth.checkpoint.basis import GIVEN, Basis, Means, digest
from vllm_w8a8_bismooth.checkpoint.files import CONFIG, RECIPE, read_json
from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint
from vllm_w8a8_bismooth.errors import BismoothError, Problem, Unproven

_KEY = "layout"
_AGAIN = f"put {CONFIG} back if it was changed, or convert the source again"


def noted(folder: Path) -> Basis | None:
    """What recipe.json says that the layout rests on; ``None`` if it says nothing, as before there were such records,
    and for checkpoints of others.

    Raises:
        BismoothError: it cannot be read.
    """
    if not (folder / RECIPE).is_file() or (value := read_json(folder / RECIPE).get(_KEY)) is None:
        return None
    try:
        return Basis.of_json(value)
    except ValueError as error:
        raise BismoothError.of(f"{RECIPE}: {_KEY}", f"cannot be read ({error})", _AGAIN) from None


def compare(before: Basis, now: Basis, checkpoint: Checkpoint, means: Means) -> tuple[list[Problem], list[str]]:
    """Faults and notes: a difference is a fault if the versions are those that noted it.

    Args:
        before: what recipe.json says.
        now: what the checkpoint was laid out by.
        checkpoint: whose config is asked again for what has a record.
        means: whether code may run, and progress.
    """
    try:
        if before.record is None:
            here = now.versions
            same = before.identity == now.identity
        else:
            here = Basis.of(before.by, before.record, []).versions
            same = _again(before, checkpoint, means) == before.sha256
    except Unproven as error:
        why = error.problems[0].what
        return [], [f"the sites in {RECIPE} could not be found again ({why}); they are taken as noted"]
    except BismoothError as error:
        same, why = False, f" ({error.problems[0].what})"
    else:
        why = ""
    if same:
        return [], []
    what = f"is not that of a model with this {CONFIG}{why}"
    if dict(before.versions) == dict(here):
        return [Problem(f"{RECIPE}: {_KEY}", what, _AGAIN)], []
    older = ", ".join(f"{name} {before.versions[name]}" for name in sorted(before.versions))
    return [], [f"the layout in {RECIPE} {what}; it was noted by {older}, and is taken as noted"]


def _again(before: Basis, checkpoint: Checkpoint, means: Means) -> str:
    """The hash of what is found out today, or is left of a record that was given."""
    from vllm_w8a8_bismooth.discovery.discover import discover  # which imports transformers

    given = before.record if before.by == GIVEN else None
    return digest(discover(checkpoint.config, checkpoint.code, means.progress, given))
