"""Checkpoints that hold more, less or otherwise called tensors than a causal LM: what is right is taken as it is."""

import importlib
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForQuestionAnswering

from tests.support.command import converted, refused, run
from tests.support.contents import tensors_of
from tests.support.damage import config, edit_json
from tests.support.models import MODEL_TYPES
from tests.support.rename import architecture, bare, edit_tensors, renamed
from vllm_w8a8_bismooth.checkpoint.files import read_json
from vllm_w8a8_bismooth.model import classes
from vllm_w8a8_bismooth.model.names import Names, unwrapped
from vllm_w8a8_bismooth.verification import verify

# --- wrappers -------------------------------------------------------------------------------------------------------

WRAPPED = {
    "torch.compile": "_orig_mod.{}",
    "data parallel": "module.{}",
    "both": "_orig_mod.module.{}",
    "PEFT": "base_model.model.{}",
    "trainer": "actor.{}",
    "blocks": None,
    "FSDP": "_fsdp_wrapped_module.{}",
}


def wrapped(kind: str, name: str) -> str:
    if kind != "blocks":
        return WRAPPED[kind].format(name)
    return (
        name.replace("layers.", "layers.", 1)
        .replace(".self_attn.", "._orig_mod.self_attn.")
        .replace(".mlp.", "._checkpoint_wrapped_module.mlp.")
    )


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("shift", ["causal", "bare"])
def test_wrapped_names_are_written_without_and_that_is_said(make, tmp_path, kind, shift):
    source = make()
    if shift == "bare":
        renamed(source, bare)
        architecture(source, "LlamaModel")
    converted(source, tmp_path / "plain")
    renamed(source, lambda name: wrapped(kind, name))
    message = converted(source, tmp_path / "out")
    assert "which a wrapper left" in message
    plain, out = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    assert plain.keys() == out.keys() and all(torch.equal(plain[name], out[name]) for name in plain)
    assert verify(tmp_path / "out", source, engine=False).ok
    code, shown = run("inspect", source)
    assert code == 0 and "which a wrapper left" in shown


BESIDE = {
    "TRL": ("pretrained_model.", "pretrained_model.", "v_head.summary.weight"),
    "multimodal": ("model.", "model.language_model.", "model.visual.proj.weight"),
    "base model": ("model.", "model.base_model.", "score.weight"),
    "another name": ("model.", "transformer.", "other.weight"),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_only_the_decoder_is_wrapped_in(make, tmp_path, kind):
    """The head beside it keeps its name, and what a reader looks for is there."""
    source, (old, new, other) = make(), BESIDE[kind]
    extra = {other: torch.randn(1, 64)}
    edit_tensors(source, lambda tensors: tensors | extra)
    converted(source, tmp_path / "plain")

    def name_of(name: str) -> str:
        return name if name == other else name.replace(old, new, 1) if kind != "TRL" else new + name

    renamed(source, name_of)
    message = converted(source, tmp_path / "out")
    assert f"hold '{new}', which a wrapper left" in message
    plain, out = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    assert plain.keys() == out.keys() and all(torch.equal(plain[name], out[name]) for name in plain)
    assert verify(tmp_path / "out", source, engine=False).ok


def test_several_models_of_which_none_is_named(make, tmp_path):
    source = make()
    renamed(source, bare)
    edit_tensors(source, lambda tensors: {f"{a}.{n}": t.clone() for n, t in tensors.items() for a in ("doc", "query")})
    architecture(source, "LlamaModel")
    refused(source, tmp_path, "doc.layers and query.layers: are blocks of several models", "keep only the tensors")


def test_a_copy_beside_the_model_is_not_taken_for_it(make, tmp_path):
    source = make()
    edit_tensors(source, lambda tensors: tensors | {f"ema.{n}": t + 1 for n, t in tensors.items()})
    converted(source, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert after["ema.model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert after["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8


def test_names_that_only_some_tensors_have(make, tmp_path):
    source = make()
    renamed(source, lambda name: f"policy.{name}" if "layers.1." in name else name)
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and "model.layers.1.*: 1 whole block is missing" in message


def test_two_tensors_of_one_name(make, tmp_path):
    source = make()
    name = "model.norm.weight"
    edit_tensors(source, lambda tensors: tensors | {f"_orig_mod.{name}": tensors[name].clone()})
    refused(source, tmp_path, f"and {name} are both {name}" if False else "are both model.norm.weight")


def test_an_adapter_that_was_not_merged(make, tmp_path):
    source, linear = make(), "model.layers.0.self_attn.q_proj"
    renamed(source, lambda name: "base_model.model." + name.replace(f"{linear}.", f"{linear}.base_layer."))
    more = {f"base_model.model.{linear}.lora_A.default.weight": torch.zeros(4, 64)}
    edit_tensors(source, lambda tensors: tensors | more)
    refused(source, tmp_path, "was not merged", "merge_and_unload()")


@pytest.mark.parametrize("part", ["modules_to_save.default", "original_module"])
def test_a_module_that_an_adapter_replaced(make, tmp_path, part):
    """PEFT keeps the trained module beside the old one until they are merged."""
    source = make()
    renamed(source, lambda name: name.replace("lm_head.weight", f"lm_head.{part}.weight"))
    refused(source, tmp_path, f"lm_head.{part}.weight: belongs to an adapter", "was not merged", "merge_and_unload()")


@pytest.mark.parametrize("prefix, name_of", [
    ("blk.", lambda name: name.replace("model.layers.", "blk.").replace("self_attn.q_proj", "attn_q")),
    ("transformer.h.", lambda name: name.replace("model.layers.", "transformer.h.")),
], ids=["llama.cpp", "GPT-2"])  # fmt: skip
def test_the_files_of_another_format(make, tmp_path, prefix, name_of):
    source = make()
    renamed(source, name_of)
    refused(
        source,
        tmp_path,
        "none of the tensors of such a model's blocks",
        f"they are called like {prefix}0.",
        "and not like model.layers.0.",
        "as its publisher stores it",
    )


OTHERWISE = {
    "pruned": lambda tensors: {name.replace("up_proj.weight", "up_proj.weight_orig"): t for name, t in tensors.items()},
    "parametrized": lambda tensors: {
        name.replace("q_proj.weight", "q_proj.parametrizations.weight.original"): t for name, t in tensors.items()
    },
    "fused": lambda tensors: {name.replace("mlp.gate_proj", "mlp.gate_up_proj"): t for name, t in tensors.items()},
}


@pytest.mark.parametrize("kind", OTHERWISE)
def test_weights_under_other_names_are_not_to_be_removed(make, tmp_path, kind):
    """One sentence says it. What is called otherwise is needed, so that no remedy may remove it, or load and save the
    model, in which transformers would put random weights in its place."""
    source = make()
    edit_tensors(source, OTHERWISE[kind])
    refused(source, tmp_path, "(and 2 more): missing, while model.layers.0.", "is not part of a llama model")
    message = run("convert", source, tmp_path / "out", "--method", "rtn")[1]
    assert "give the checkpoint as its publisher stores it" in message
    assert "remove" not in message and "save" not in message


def test_stacked_experts(make, tmp_path):
    """As a state dict of transformers 5 has them. To load and save them would give the same names again."""
    source = make("qwen3_moe")

    def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {name: t for name, t in tensors.items() if ".experts." not in name}
        for mlp in sorted({name.partition("experts.")[0] for name in tensors.keys() - kept.keys()}):
            gate, up, down = (
                torch.stack([tensors[f"{mlp}experts.{e}.{part}_proj.weight"] for e in range(4)])
                for part in ("gate", "up", "down")
            )
            kept |= {f"{mlp}experts.gate_up_proj": torch.cat([gate, up], 1), f"{mlp}experts.down_proj": down}
        return kept

    edit_tensors(source, stacked)
    refused(
        source,
        tmp_path,
        "model.layers.1.mlp.experts.0.down_proj.weight (and 23 more): missing, while model.layers.1.mlp.experts.",
        "(and 3 more) holds stacked experts, as transformers 5 keeps them in memory",
        "download the original checkpoint, which has one tensor an expert",
    )


def test_experts_in_modules_of_another_name(make, tmp_path):
    """As transformers calls Mixtral's in memory."""
    source = make("mixtral")
    renamed(source, lambda name: name.replace("block_sparse_moe.", "mlp."))
    refused(
        source,
        tmp_path,
        "block_sparse_moe.experts.0.w1.weight (and 38 more): missing, while model.layers.0.mlp.",
        "stores",
    )
    assert "save" not in run("convert", source, tmp_path / "out", "--method", "rtn")[1]


def test_a_model_that_is_called_another_is_not_to_be_mutilated(make, tmp_path):
    """Qwen3 without its q_norm and k_norm would be converted, and speak nonsense."""
    source = make("qwen3")
    config(model_type="llama")(source)
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and message.count("mend config.json (model_type, or the switch for it)") == 6
    assert message.count("remove the tensor only if it was not") == 6


# --- more than a model ----------------------------------------------------------------------------------------------

BUFFERS = {
    "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(),
    "model.layers.1.self_attn.mask": torch.ones(8, 8, dtype=torch.uint8),
    "model.layers.1.mlp.steps": torch.tensor(7),
    "model.layers.2.self_attn.rotary_emb.inv_freq": torch.arange(12.0, dtype=torch.float64),
    "model.layers.1.self_attn.rotary_emb.inv_freq": torch.arange(6.0),  # of half a head, as with partial rotary
    "model.layers.2.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 16, 24),
    "model.rotary_emb.inv_freq": torch.arange(12.0, dtype=torch.float64),
    "model.mask": torch.full((8, 8), float("-inf"), dtype=torch.float64).triu(1),
    "model.position_ids": torch.arange(8),
    "num_batches_tracked": torch.tensor([3], dtype=torch.int32),
    "short": torch.tensor([3, 4], dtype=torch.int16),
}


@pytest.mark.parametrize("options", [("--method", "rtn"), ()], ids=["rtn", "data-free"])
def test_buffers_pass_through(make, tmp_path, options):
    source = make()
    edit_tensors(source, lambda tensors: tensors | BUFFERS)
    converted(source, tmp_path / "out", *options)
    after = tensors_of(tmp_path / "out")
    for name, tensor in BUFFERS.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    found = verify(tmp_path / "out", source, engine=False)
    assert found.ok, found.findings


def test_calibration_with_buffers(make, tmp_path, calibration_text):
    source = make()
    edit_tensors(source, lambda tensors: tensors | BUFFERS)
    converted(source, tmp_path / "out", "--calibration", str(calibration_text))


def test_weights_in_fp64_are_refused_and_the_remedy_is_true(make, tmp_path):
    source, name = make(), "model.layers.1.mlp.up_proj.weight"
    edit_tensors(source, lambda tensors: tensors | {name: tensors[name].double()})
    refused(source, tmp_path, f"{name}: has dtype F64", "model.to(torch.bfloat16).save_pretrained(FOLDER)")


@pytest.mark.parametrize("packed", ["qweight", "weight_packed"])
def test_packed_weights_are_no_buffers(make, tmp_path, packed):
    source, name = make(), "model.layers.1.mlp.up_proj."
    edit_tensors(
        source,
        lambda t: (
            {k: v for k, v in t.items() if not k.startswith(name)}
            | {name + packed: torch.ones(8, 96, dtype=torch.int32)}
        ),
    )
    code, message = run("convert", source, tmp_path / "out", "--method", "rtn")
    assert code == 2 and "already quantized" in message


def further(tensors: dict[str, torch.Tensor], index: int = 3) -> dict[str, torch.Tensor]:
    """A block behind the last that predicts a further token, as DeepSeek's and GLM's checkpoints have it."""
    block = {
        name.replace("layers.1.", f"layers.{index}."): t.clone() for name, t in tensors.items() if "layers.1." in name
    }
    extra = {
        "eh_proj.weight": (64, 128),
        "enorm.weight": (64,),
        "hnorm.weight": (64,),
        "shared_head.norm.weight": (64,),
    }
    return tensors | block | {f"model.layers.{index}.{n}": torch.randn(s).bfloat16() for n, s in extra.items()}


@pytest.mark.parametrize("key", [None, "num_nextn_predict_layers"])
def test_blocks_that_predict_further_tokens_are_carried_along(make, tmp_path, key):
    source = make()
    edit_tensors(source, further)
    if key:
        config(**{key: 1})(source)
    message = converted(source, tmp_path / "out")
    assert "block 3, which predicts further tokens (MTP), stays in the source's dtype" in message
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert all(torch.equal(after[name], t) for name, t in before.items() if "layers.3." in name)
    found = verify(tmp_path / "out", source, engine=False)
    assert found.ok, found.findings


@pytest.mark.parametrize(
    "said",
    [{"num_nextn_predict_layers": 1}, {"mtp_loss_scaling_factor": 0.3}, {"num_mtp_layers": True}, {"use_mtp": 3}],
)
def test_own_blocks_do_not_predict_because_of_a_key(make, tmp_path, said):
    """Neither more of them than it counts, nor any where it counts none."""
    source = make()
    config(num_hidden_layers=1, **said)(source)
    refused(source, tmp_path, "model.layers.1.*: 18 tensors belong to no block", "set num_hidden_layers to 3")
    config(num_hidden_layers=3)(source)
    assert "(MTP)" not in converted(source, tmp_path / "out")


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers"])
def test_blocks_like_others_predict_if_the_config_counts_them(make, tmp_path, key):
    source = make()
    config(num_hidden_layers=2, **{key: 1})(source)
    assert "block 2, which predicts further tokens (MTP)" in converted(source, tmp_path / "out")


@pytest.mark.parametrize("called", ["mtp_layers", "mtp_block"])
def test_predictors_of_other_names_stay_in_float_under_vllms(make, tmp_path, called):
    """MiMo's and ERNIE's: vLLM asks about them as blocks behind the last."""
    source = make()
    edit_tensors(
        source,
        lambda tensors: (
            tensors
            | {n.replace("layers.1.", f"{called}.0."): t.clone() for n, t in tensors.items() if "layers.1." in n}
        ),
    )
    config(num_nextn_predict_layers=1)(source)
    converted(source, tmp_path / "out")
    ignored = read_json(tmp_path / "out" / "config.json")["quantization_config"]["ignore"]

    def stays(module: str) -> bool:
        return any(re.match(pattern.removeprefix("re:"), module) for pattern in ignored)

    assert stays("model.layers.3.self_attn.qkv_proj") and stays(f"model.{called}.0.mlp.gate_up_proj")
    assert not stays("model.layers.2.self_attn.qkv_proj") and not stays("model.layers.4.mlp.down_proj")
    assert verify(tmp_path / "out", source, engine=False).ok


def test_an_own_block_before_one_that_predicts_further_tokens(make, tmp_path):
    """The remedy counts only the former, and works."""
    source = make()
    edit_tensors(
        source,
        lambda tensors: further(
            tensors | {n.replace("layers.1.", "layers.3."): t.clone() for n, t in tensors.items() if "layers.1." in n},
            4,
        ),
    )
    refused(source, tmp_path, "model.layers.3.*: 9 tensors belong to no block", "set num_hidden_layers to 4")
    config(num_hidden_layers=4)(source)
    assert "block 4, which predicts further tokens" in converted(source, tmp_path / "out")


def test_what_bismooth_made_is_quantized_and_not_misnamed(make, tmp_path):
    converted(make(), tmp_path / "out")
    refused(tmp_path / "out", tmp_path / "again", "dtype I8", "already quantized")


def test_stale_quantization_config_is_named_and_the_remedy_works(make, tmp_path):
    source = make()
    config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})(source)
    refused(source, tmp_path, "'bitsandbytes'", "all weights are float (BF16)", "remove quantization_config from")
    edit_json(source / "config.json", lambda c: c.pop("quantization_config"))
    converted(source, tmp_path / "out")


def test_two_stale_keys_are_one_remedy(make, tmp_path):
    source, stale = make(), {"quant_method": "fp8"}
    config(quantization_config=stale, compression_config=stale)(source)
    refused(source, tmp_path, "remove quantization_config and compression_config from config.json")


def test_scales_beside_float_weights_are_none_of_that(make, tmp_path):
    source = make()
    config(quantization_config={"quant_method": "fp8"})(source)
    more = {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)}
    edit_tensors(source, lambda tensors: tensors | more)
    refused(source, tmp_path, "has dtype BF16, and a scale is beside it", "download the checkpoint again")


# --- what a class calls its decoder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_class_finds_its_decoder(model_type):
    """Under the name that transformers' class has for it."""
    module = "gemma3" if model_type == "gemma3_text" else model_type
    built = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    family = classes.family_of({"model_type": model_type})
    found = [name for name in vars(built) if name.startswith(f"{family}For")]
    assert found or model_type == "gemma3_text"
    for name in found:
        prefix = vars(built)[name].base_model_prefix
        assert classes.trunk_of({"model_type": model_type, "architectures": [name]}) == f"{prefix}.", name


@pytest.mark.parametrize("around", ["", "_orig_mod.", "actor."])
def test_a_decoder_that_its_class_calls_transformer(make, tmp_path, around):
    """What transformers saved, it opens again: nothing is made up."""
    source = make()
    model = LlamaForQuestionAnswering(LlamaConfig.from_pretrained(source)).bfloat16()
    model.save_pretrained(source)
    converted(source, tmp_path / "plain")
    renamed(source, lambda name: around + name)
    assert ("which a wrapper left" in converted(source, tmp_path / "out")) == bool(around)
    plain, out = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    assert plain.keys() == out.keys() and "transformer.layers.0.mlp.up_proj.weight_scale" in out
    assert {name.removesuffix("_scale") for name in out} == model.state_dict().keys()
    assert verify(tmp_path / "out", source, engine=False).ok


@pytest.mark.parametrize("around", ["", "_orig_mod."])
def test_names_of_a_bare_decoder_beside_a_head(make, tmp_path, around):
    """No reader looks for them there: they are written as it does, and said; verify does not pass them."""
    source = make()
    converted(source, tmp_path / "plain")
    renamed(source, lambda name: around + name.removeprefix("model."))
    message = " ".join(converted(source, tmp_path / "out").split())
    assert "lack the 'model.' under which they are looked for where lm_head.weight is beside them" in message
    assert tensors_of(tmp_path / "out").keys() == tensors_of(tmp_path / "plain").keys()
    assert verify(tmp_path / "out", source, engine=False).ok
    renamed(tmp_path / "out", lambda name: around + name.removeprefix("model."))
    findings = verify(tmp_path / "out", engine=False).findings
    assert any("but vLLM reads them as they stand" in finding.what for finding in findings)


# --- the module itself ----------------------------------------------------------------------------------------------


def test_the_decoder_is_where_the_embedding_is():
    names = [
        "vision.layers.0.a",
        "vision.layers.1.a",
        "vision.layers.2.a",
        "model.layers.0.a",
        "model.embed_tokens.weight",
    ]
    assert Names.among(names) == Names.behind("model.") and Names.among(names[:3]) == Names.behind("vision.")
    assert Names.among(["layers.0.a", "embed_tokens.weight"]) == Names.behind("") and Names.among([]) == Names()


def test_plain_names_stay():
    names = ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"]
    assert unwrapped(names) == ({name: name for name in names}, None)
