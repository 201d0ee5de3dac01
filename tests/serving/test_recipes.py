"""The commands of docs/ for several GPUs and machines, as they are printed there, with small models and sizes."""

import math
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from benchmarks.convert import WHOLE_70B
from benchmarks.random_llama import checkpoint, hole
from benchmarks.score import engine_environment
from benchmarks.server import command_of, running, serve
from tests.support.agreement import assert_same_up_to_near_ties
from tests.support.contents import digests
from tests.support.conversion import convert
from tests.support.damage import edit_json
from tests.support.models import tiny_model, write_checkpoint
from tests.support.workers.engine import PROMPTS, ask
from vllm_w8a8_bismooth import grouping
from vllm_w8a8_bismooth.checkpoint.files import Folder
from vllm_w8a8_bismooth.checkpoint.layout import Layout
from vllm_w8a8_bismooth.checkpoint.reader import Headers
from vllm_w8a8_bismooth.conversion.estimate import needs
from vllm_w8a8_bismooth.conversion.inspect import survey
from vllm_w8a8_bismooth.conversion.rates import Rates
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.serving import guard

DOCS = Path(__file__).parents[2] / "docs"
WHOLE_405B = WHOLE_70B | {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
}
TWO_CORES = Rates(rounding=3.6e8, reading=math.inf, arithmetic="bfloat16", products=5.6e11, precise=1.9e11)
"""What two cores did, in benchmarks/results/avx512_vnni-amd-epyc-2-cores/convert.json."""
GPUS = 8
"""Of a node, in the documents."""

Command = tuple[str, list[str]]
"""Where it is given (``node 0``; empty where there is one machine), and its words."""


def section(page: str, heading: str) -> str:
    """What is under a heading, up to the next one of its level."""
    found = re.search(rf"^(##+) {re.escape(heading)}\n(.*?)(?=^\1 |\Z)", (DOCS / page).read_text(), re.M | re.S)
    assert found, heading
    return found[2]


def recipes(page: str, heading: str) -> list[list[Command]]:
    """The fenced blocks under a heading: ``where   command`` a line; what is indented belongs to the same machine."""
    blocks = []
    for text in re.findall(r"^```\n(.*?)^```$", section(page, heading), re.M | re.S):
        where, block = "", []
        for line in text.splitlines():
            named, command = re.fullmatch(r"(?:((?:node|machine) \d+) {2,})?\s*(.*)", line).groups()
            where = named or where
            block.append((where, shlex.split(command)))
        blocks.append(block)
    return blocks


def option(words: list[str], name: str, default: int = 1) -> int:
    return int(words[words.index(name) + 1]) if name in words else default


SERVING = "Several GPUs, several nodes"
SERVES = [
    [words for _, words in block if words[:2] == ["vllm", "serve"]]
    for block in recipes("serving.md", SERVING)
    if any(words[0] == "vllm" for _, words in block)
]


@pytest.mark.slow
def test_converting_on_several_machines(tmp_path):
    """Each machine a folder with its own copy of the source, all at once; the sizes are those of a small model."""
    (block,) = recipes("converter.md", "On several machines")
    source = write_checkpoint(tmp_path / "alone" / "SRC", tiny_model("llama", num_hidden_layers=6))
    machines = {where: tmp_path / where.replace(" ", "") for where, _ in block}
    for folder in machines.values():
        shutil.copytree(source, folder / "SRC")

    def scaled(word: str) -> str:
        return ":".join(str(round(int(end) * 6 / 126)) for end in word.split(":")) if re.match(r"\d+:", word) else word

    parts = [
        subprocess.Popen([*command_of(words[0]), *map(scaled, words[1:])], cwd=machines[where], stderr=subprocess.PIPE)
        for where, words in block
        if words[:2] == ["bismooth", "convert"]
    ]
    for process in parts:
        assert process.wait(600) == 0, process.stderr.read()
    assert len(parts) == len(machines) > 2
    for where, words in block[len(parts) :]:
        if words[0] == "rsync":
            _, flags, origin, target = words  # rsync takes one machine a command
            machine, _, name = origin.partition(":")
            assert (flags, target) == ("-a", ".")
            shutil.copytree(tmp_path / machine / name, machines[where] / name)
        else:
            done = subprocess.run(
                [*command_of(words[0]), *words[1:]], cwd=machines[where], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
    convert(source, tmp_path / "alone" / "DST", Recipe.of("bismooth"))
    assert digests(machines["machine 1"] / "DST") == digests(tmp_path / "alone" / "DST")
    assert block[-1][1] == ["bismooth", "verify", "DST"]


@pytest.fixture(scope="module")
def llama_405b(tmp_path_factory) -> Path:
    """Its headers, in sparse files."""
    return checkpoint(tmp_path_factory.mktemp("whole") / "llama", WHOLE_405B, hole)


def test_figures_of_405b(llama_405b):
    text = section("serving.md", "LLaMA 3.1 405B on two nodes with eight GPUs of 80 GB")
    rows = {name: cells for name, *cells in (line[1:-1].split("|") for line in text.splitlines() if line[:2] == "| ")}
    ranks = [int(cell.removeprefix(" tp ")) for cell in rows.pop(" ")]
    found = {size: survey(Folder(llama_405b), 16384, size) for size in grouping.SIZES}
    sizes, need = found[128].sizes, found[128].needs["data-free"]
    told = iter([row for row in rows.values() if not row[0].startswith("-")])
    assert [int(cell) for cell in next(told)] == [sizes["hidden"] // r for r in ranks]
    assert [int(cell) for cell in next(told)] == [sizes["intermediate"] // r for r in ranks]
    fitting = [[size for size in grouping.SIZES if not found[size].per_group[r]] for r in ranks]
    assert [[int(size) for size in cell.split(",")] for cell in next(told)] == fitting
    assert [cell.strip() for cell in next(told)] == [f"{need.written_bytes / 1e9 / r:.1f} GB" for r in ranks]
    layout = Layout(Headers(Folder(llama_405b)))
    for figure, value in {
        r"(\d+) minutes for two cores": needs(layout, None, TWO_CORES).seconds / 60,
        r"for (\d+) hours on two cores": needs(layout, 16384, TWO_CORES).seconds / 3600,
        r"downloads (\d+) GB": need.source_bytes / 1e9,
        r"writes (\d+) GB": need.written_bytes / 1e9,
    }.items():
        assert int(re.search(figure, text)[1]) == round(value), figure
    assert need.memory_bytes < 8e9
    assert "share of K = 53248 is not a multiple of group_size = 512" in found[512].per_group[16][0]


@pytest.fixture(scope="module")
def config_405b(tmp_path_factory) -> Path:
    """A converted checkpoint's config and tokenizer with 405B's sizes, without weights."""
    folder = tmp_path_factory.mktemp("config")
    source = write_checkpoint(folder / "source", tiny_model("llama"))
    convert(source, folder / "DST", Recipe.of("bismooth", group_size=32, group_layers="o_proj|down_proj"))
    edit_json(folder / "DST" / "config.json", lambda config: config.update(WHOLE_405B))
    for shard in (folder / "DST").glob("*.safetensors"):
        shard.unlink()
    return folder / "DST"


@pytest.mark.parametrize("block", SERVES, ids=lambda block: " ".join(block[0][3:]))
def test_vllm_takes_every_command(config_405b, monkeypatch, block):
    """Parsed as ``vllm serve`` does; and its configuration holds as many nodes, and GPUs of each, as it is told for."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.chdir(config_405b.parent)
    (verb,), parser = cmd_init(), FlexibleArgumentParser()
    verb.subparser_init(parser.add_subparsers())
    for rank, words in enumerate(block):
        args = parser.parse_args(words[1:])
        verb.validate(args)
        assert args.model_tag == "DST"
        if args.distributed_executor_backend == "ray":  # whose configuration needs Ray
            continue
        args.model = args.model_tag
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(headless=args.headless)
        parallel = config.parallel_config
        assert config.model_config.quantization == "w8a8_bismooth"
        assert parallel.world_size * parallel.data_parallel_size in (2, GPUS, 2 * GPUS)
        nodes = option(words, "--nnodes")
        if nodes > 1:
            assert len(block) == nodes and option(words, "--node-rank") == rank and args.headless == (rank > 0)
            assert parallel.local_world_size * parallel.data_parallel_size_local == GPUS


@pytest.mark.engine
def test_tensor_parallel_over_two_nodes(checkpoints, tmp_path, monkeypatch):
    """The last recipe for several nodes: both on this machine, per-group where a rank has a part of K."""
    from openai import OpenAI

    (block,) = (block for block in SERVES if all(option(words, "--tensor-parallel-size") == 16 for words in block))
    model = tmp_path / "DST"
    convert(checkpoints["planted"], model, Recipe.of("bismooth", group_size=32, group_layers="o_proj|down_proj"))
    alone = ask(tmp_path / "alone", model, enforce_eager=True)

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # both nodes on the cores that there are
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    changed = {"DST": str(model), "16": "2", "HEAD": "127.0.0.1"}
    small = ["--enforce-eager", "--max-model-len", "256", "--master-port", port]
    first, second = ([changed.get(word, word) for word in words] + small for words in block)
    logs = [tmp_path / "node0.log", tmp_path / "node1.log"]
    other = running([*command_of("vllm"), *second[1:]], engine_environment(), logs[1])
    with other, serve(model, logs[0], *first[3:], "--return-tokens-as-token-ids") as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="unused")
        asked = {"model": str(model), "max_tokens": 24, "temperature": 0, "logprobs": 5}
        told = [client.completions.create(prompt=prompt, **asked).choices[0].logprobs for prompt in PROMPTS]

    def number(token: str) -> str:
        return token.removeprefix("token_id:")

    shared = {
        "tokens": [[int(number(token)) for token in answer.tokens] for answer in told],
        "logprobs": [[{number(t): lp for t, lp in step.items()} for step in answer.top_logprobs] for answer in told],
    }
    assert_same_up_to_near_ties(shared, alone)
    for log in (path.read_text() for path in logs):
        assert "per-group (32) linears run on" in log and "per-channel linears run on" in log
        assert log.count("w8a8_bismooth: hashed") == 1


def test_what_was_hashed_is_not_hashed_again(make_checkpoint, tmp_path, monkeypatch):
    """By a process that inherits the environment, as those that vLLM starts do, unless a file has changed."""
    hashed, folder = [], tmp_path / "out"
    monkeypatch.delenv(guard.HASHED, raising=False)
    monkeypatch.setattr(guard, "sha256", lambda path, original=guard.sha256: hashed.append(path) or original(path))
    convert(make_checkpoint(), folder, Recipe.of("rtn"))
    shard = folder / "model.safetensors"
    for _ in range(2):
        guard.check_files(folder)
        assert hashed == [shard]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for times in (2, 3):
        with pytest.raises(ValueError, match="model.safetensors: has SHA-256"):
            guard.check_files(folder)
        assert hashed == [shard] * times
