"""How the command line is read, beyond what typer does: nothing that is given may vanish."""

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from vllm_w8a8_bismooth.errors import BismoothError, Problem, refuse_empty
from vllm_w8a8_bismooth.shell import refuse_tilde

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="Folder of a Hugging Face checkpoint (safetensors), or org/name\\[@revision] on the Hub."
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the model's own code, from the checkpoint's folder, where transformers lacks its type.",
    ),
]
_GO_ON = ("convert", "merge", "push", "score")
_DRY = f"{__name__}.dry"


def path(text: str) -> Path:
    """Reads a path for typer, which takes an empty one for the current folder."""
    refuse_empty("a path", text)
    refuse_tilde(text)
    return Path(text)


class Verbs(typer.core.TyperGroup):
    """The verbs. Refuses an option that is given twice, unless it adds up, where the last one would count in silence.

    Flags are shown without a type, and Ctrl-C ends a verb with one line and exit code 130.
    """

    def resolve_command(self, ctx, args):
        name, verb, rest = super().resolve_command(ctx, args)
        with verb.context_class(verb, info_name=name, parent=ctx, resilient_parsing=True) as inner:
            _, _, order = verb.make_parser(inner).parse_args(args=list(rest))
            _show_no_type_of_flags(verb.get_params(inner))
        ctx.meta[_DRY] = any(option.name == "dry_run" for option in order)
        counts = Counter(option for option in order if option.param_type_name == "option")
        twice = [o.opts[0] for o, count in counts.items() if count > 1 and not (o.multiple or o.is_eager)]
        if twice:
            raise BismoothError(*(Problem(option, "given twice", "give it once") for option in twice))
        return name, verb, rest

    def get_params(self, ctx):
        return _show_no_type_of_flags(super().get_params(ctx))

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            begun = ctx.invoked_subcommand in _GO_ON and not ctx.meta.get(_DRY)
            goes_on = "; the same command goes on from there" if begun else ""
            print(f"Interrupted{goes_on}", file=sys.stderr)
            raise typer.Exit(130) from None


def _show_no_type_of_flags(parameters):
    for parameter in parameters:
        if getattr(parameter, "is_flag", False) and parameter.metavar is None:
            parameter.metavar = ""
    return parameters
