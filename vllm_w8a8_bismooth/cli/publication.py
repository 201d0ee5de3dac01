"""The verb ``push``, the options that other verbs share with it, and the last words on an upload."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_w8a8_bismooth.cli import display
from vllm_w8a8_bismooth.cli.arguments import path
from vllm_w8a8_bismooth.cli.progress import Progress
from vllm_w8a8_bismooth.errors import BismoothError

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_w8a8_bismooth.publication import Publication

BaseModelOption = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="ORG/NAME",
        help="For the model card: the original's id on the Hub.",
        show_default="the source, if it is there",
    ),
]
LicenseOption = Annotated[
    str | None,
    typer.Option(
        "--license",
        metavar="ID",
        help="For the model card: the original's licence, as the Hub or SPDX calls it.",
        show_default="that of the source's card",
    ),
]
PushOption = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="ORG/NAME", help="Then upload it, as bismooth push does; private."),
]
PublicOption = Annotated[bool, typer.Option("--public", help="With --push-to-hub: everybody may read it.")]


def check(destination: Path, hub_id: str | None, public: bool, part: bool) -> None:
    """Check the options of ``convert`` that end in an upload, and at the Hub all that can be checked before it."""
    if hub_id is None:
        if public:
            raise BismoothError.of("--public", "has no effect without --push-to-hub", "leave it out, or give both")
        return
    if part:
        what = "a part of a checkpoint is not uploaded"
        raise BismoothError.of("--push-to-hub", what, "leave it out; after bismooth merge, give DST to bismooth push")
    from vllm_w8a8_bismooth.publication import check as run

    run(destination, hub_id, public)


def planned(hub_id: str | None, public: bool) -> str | None:
    """What a dry run says of the upload."""
    if hub_id is None:
        return None
    return f"Then it is uploaded to {hub_id} ({'everybody may read it' if public else 'private'})"


def send(folder: Path, hub_id: str, public: bool, console: "Console") -> dict[str, Any]:
    """Upload a checkpoint; what came of it goes to the console, and is returned for ``--json``."""
    from vllm_w8a8_bismooth.publication import push as run

    with Progress(console) as progress:
        done = run(folder, hub_id, public, progress)
    _summary(console, folder, done)
    return asdict(done)


def push(
    folder: Annotated[Path, typer.Argument(parser=path, metavar="DST", help="Folder that convert or merge wrote.")],
    hub_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository; it is created if it does not exist.")],
    public: Annotated[bool, typer.Option("--public", help="Everybody may read it; else it is private.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is there as JSON on stdout.")] = False,
) -> None:
    """Upload a converted checkpoint to the Hugging Face Hub, in one commit.

    It is verified first, without vLLM. A push that was interrupted goes on, and sends nothing twice.
    Log in before it with [bold]hf auth login[/bold], with a token that may write.
    """
    done = send(folder, hub_id, public, display.console(stderr=True))
    if as_json:
        print(json.dumps(done, indent=2))


def _summary(console: "Console", folder: Path, done: "Publication") -> None:
    from vllm_w8a8_bismooth.report import card

    who = "everybody may read it" if done.public else "private"
    console.print(f"{done.files} files, {done.nbytes / 1e9:.3f} GB, are at {done.url} ({who}).", highlight=False)
    if done.left_out:
        more = f" and {len(done.left_out) - 4} more" if len(done.left_out) > 4 else ""
        files = f"{', '.join(done.left_out[:4])}{more}"
        console.print(f"Left here, as no part of a checkpoint: {files}.", markup=False, highlight=False)
    if missing := card.missing(folder):
        console.print(f"The card names no {' and no '.join(missing)}: write it into README.md and push again.")
