"""What the last block leaves, made predictions as transformers makes them, and how these depend on it."""

import pytest
import torch

from tests.support.models import MODEL_TYPES, tiny_config, tiny_model, write_checkpoint
from tests.support.sweep import sweep
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.measure.logits import Logits, predicts_tokens

CPU, HIDDEN = torch.device("cpu"), 64


def hidden_states(count: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 12, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model_type", sweep(["gemma2", *(t for t in MODEL_TYPES if t != "gemma2")], fast=3))
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_logits_are_those_of_the_model(tmp_path, model_type, tied):
    """With whatever the type does to them: a cap, a scale, a norm whose gain is stored less one."""
    model = tiny_model(model_type, tie_word_embeddings=tied).eval()
    source = Source(write_checkpoint(tmp_path / "source", model, torch.float32))
    hidden, caught = hidden_states(), []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: (hidden,))
    model.model.register_forward_hook(lambda module, inputs, outputs: caught.append(outputs.last_hidden_state))
    expected = model(input_ids=torch.zeros(2, 12, dtype=torch.long)).logits
    assert len(caught) == 1 and predicts_tokens(source)
    assert torch.equal(Logits(source, CPU, torch.float32)(hidden), expected)


def classifier(folder, **changes):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = tiny_config("llama", num_labels=3, pad_token_id=1, **changes)
    return write_checkpoint(folder, AutoModelForSequenceClassification.from_config(config), torch.float32)


def test_a_classifier_has_normed_states_instead(tmp_path):
    source = Source(classifier(tmp_path / "source"))
    assert not predicts_tokens(source)
    hidden = hidden_states()
    normed = Logits(source, CPU, torch.float32)(hidden)
    gain = source.checkpoint.read("model.norm.weight")
    by_hand = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + source.checkpoint.config["rms_norm_eps"])
    torch.testing.assert_close(normed, by_hand * gain)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "classifier"])
def test_products_with_a_small_change_make_its_divergence(tmp_path, kind):
    """Half their mean square is KL(true, changed) or, of a classifier, half the relative square of the change."""
    if kind == "classifier":
        source = Source(classifier(tmp_path / "source"))
    else:
        source = Source(write_checkpoint(tmp_path / "source", tiny_model(kind), torch.float32))
    logits, hidden, draws = Logits(source, CPU, torch.float32), hidden_states(1), 1500
    change = 0.003 * hidden_states(1, seed=2)
    gradients = logits.gradients(hidden, draws)
    assert gradients.shape == (draws, *hidden.shape) and gradients.dtype == torch.float32
    assert torch.equal(gradients, logits.gradients(hidden, draws)), "the same draws every time"
    with torch.no_grad():
        before, after = logits(hidden)[0].double(), logits(hidden + change)[0].double()
    if kind == "classifier":
        true = (after - before).square().sum(-1) / before.square().sum(-1) / 2
    else:
        true = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1)
    found = (gradients * change).sum(-1)[:, 0].double().square().mean(0) / 2
    assert float((found / true).mean()) == pytest.approx(1, abs=0.05)
    assert (found / true).sub(1).abs().max() < 0.3
