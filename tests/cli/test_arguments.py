"""How the command line is read: every option of every verb, whatever verbs there are."""

import re
from dataclasses import replace

import pytest
import typer

from tests.support.command import run
from vllm_w8a8_bismooth import api
from vllm_w8a8_bismooth.cli import main
from vllm_w8a8_bismooth.cli.advice import advice
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure.granularity import Evidence
from vllm_w8a8_bismooth.measure.used import Used
from vllm_w8a8_bismooth.recipe import DEFAULTS, Recipe
from vllm_w8a8_bismooth.report.outcome import Outcome

APP = typer.main.get_command(main.app)
VERBS = APP.commands
OPTIONS = [
    (verb, option) for verb, command in VERBS.items() for option in command.params if option.param_type_name == "option"
]


def given(option, value: str) -> list[str]:
    return [option.opts[0]] if option.is_flag else [option.opts[0], value]


@pytest.mark.parametrize(("verb", "option"), OPTIONS, ids=lambda found: getattr(found, "name", found))
@pytest.mark.parametrize("values", [("1", "1"), ("1", "2")], ids=["equal", "unlike"])
def test_no_option_vanishes(verb, option, values):
    """Given twice it adds up, or is refused before anything else is looked at."""
    words = [word for value in values for word in given(option, value)]
    try:
        code, text = run(verb, *words, "nowhere", "out")
    except BismoothError as error:
        code, text = 2, str(error)
    assert code == 2
    assert ("given twice" in text) != option.multiple, text
    if not option.multiple:
        assert text == f"{option.opts[0]}: given twice; give it once"


def test_what_is_given_twice_is_told_at_once():
    code, text = run("convert", "a", "b", "--method", "rtn", "--json", "--method=rtn", "--json")
    assert code == 2 and text.count("given twice") == 2 and "also: " in text
    assert run("convert", "a", "b", "--methodd", "rtn")[0] == 2  # typer's own message
    assert run("convert", "--help", "--help")[0] == run("--version", "--version")[0] == 0


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", ""],
        ["convert", "", "out"],
        ["convert", ".", "out", "--calibration", ""],
        ["convert", ".", "out", "--device", ""],
        ["convert", ".", "out", "--push-to-hub", ""],
        ["analyze", ""],
        ["analyze", ".", "--calibration", ""],
        ["analyze", ".", "--figures", ""],
        ["merge", "out", ""],
        ["merge", "", "."],
        ["verify", ""],
        ["verify", ".", "--against", ""],
        ["score", "", "--text", "text.txt"],
        ["score", ".", "--text", ""],
        ["score", ".", "--against", "", "--text", "config.json"],
        ["push", "", "org/name"],
        ["push", ".", ""],
    ],
    ids=" ".join,
)
def test_nothing_empty_means_the_current_folder(make_checkpoint, tmp_path, monkeypatch, words):
    """A variable of the shell that is not set, in a folder that could be converted."""
    monkeypatch.chdir(make_checkpoint())
    before = sorted(tmp_path.rglob("*"))
    code, text = run(*words)
    assert code == 2 and re.match(r"[^:]+: (is empty|not)|.*part.json: not found", text), text
    assert sorted(tmp_path.rglob("*")) == before


def rendered(*words: str) -> str:
    """Help as a terminal shows it, without frames and line breaks."""
    code, text = run(*words, "--help")
    assert code == 0
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def plain(text: str) -> str:
    """What markup leaves of a text; a bracket behind a backslash is a bracket."""
    return " ".join(re.sub(r"(?<!\\)\[/?bold\]", "", text).replace("\\[", "[").split())


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_all_that_is_written(verb, monkeypatch):
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)
    shown = rendered(verb)
    command = VERBS[verb]
    for text in [command.help, *(p.help for p in command.params)]:
        for paragraph in re.split(r"\n\s*\n", text):
            assert plain(paragraph) in shown, (paragraph, shown)
    for option in command.params:
        if option.param_type_name == "option":
            assert option.opts[0] in shown
            if not option.is_flag:
                assert f"{option.opts[0]} {option.metavar}" in shown
    assert not re.search(r"<\w+", shown.partition("Options")[2]), "a type of Python's is no word for people"


def test_help_of_all():
    shown = rendered()
    assert "<bool>" not in shown and all(verb in shown for verb in VERBS)


def advices() -> list[tuple[str, Recipe, Outcome, str]]:
    """What may have been done, and what is to be tried then."""
    found = []
    for method, options in DEFAULTS.items():
        for size in (None, 32, 128):
            for smoothing in ("balanced", "alpha"):
                for calibration in (None, "ab12"):
                    given = {"smoothing": smoothing, "alpha": 0.5 if smoothing == "alpha" else None}
                    given |= {"group_size": size, "group_layers": ("x",) if method != "auto" else None}
                    given = {key: value for key, value in given.items() if key in options}
                    recipe = Recipe(method, **given, calibration=calibration if "smoothing" in options else None)
                    for part in (None, range(2)):
                        for reason in ("removes much", "would remove much, but the budget is spent"):
                            report = Outcome("out", part=part, recipe=recipe)
                            report.granularity = [Evidence("a", ("a",), 1.0, 0.5, 0.5, 0.1, False, reason)]
                            found.append((method, recipe, report, advice(recipe, report)))
    return found


@pytest.mark.parametrize(("method", "recipe", "report", "says"), advices())
def test_advice_fits_what_was_done(method, recipe, report, says):
    assert f"--method {method}" not in says and says.startswith("Try ") and says.endswith(".")
    for option in re.findall(r"--([a-z-]+)", says):
        name = option.replace("-", "_")
        assert name in ("method", "calibration") or name in DEFAULTS[method], (option, method)
    assert ("--calibration" in says) == (method == "bismooth" and recipe.calibration is None)
    assert "--method auto" not in says or (recipe.calibration and report.part is None)
    if match := re.search(r"under (\d+)", says):
        assert int(match[1]) == recipe.group_size > 32
    stopped = method == "auto" and report.granularity[0].held_back
    assert ("--group-budget" in says) == stopped, "where it stopped nothing, a larger one gives nothing"
    assert "--smoothing balanced" not in says or recipe.smoothing == "alpha"


@pytest.mark.parametrize(("tokens", "few"), [(1, True), (1023, True), (1024, False)])
def test_few_tokens_are_named_first(tokens, few):
    recipe = replace(Recipe.of("bismooth"), calibration="0" * 64)
    report = Outcome("out", recipe=recipe)
    report.used = Used(("t",), 1, 0, None, 1, 1, tokens)
    assert advice(recipe, report).startswith("Try more calibration text") == few


@pytest.mark.parametrize(("options", "says"), [((), "; the same command goes on from there"), (("--dry-run",), "")])
def test_an_interrupted_plan_leaves_nothing_to_go_on_from(monkeypatch, options, says):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "prepare", interrupt)
    assert run("convert", "source", "out", *options) == (130, f"Interrupted{says}\n")
