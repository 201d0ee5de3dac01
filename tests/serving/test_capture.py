"""What the engine's workers keep: the logits that the model computed, as log-probabilities on the disk."""

import numpy as np
import pytest
import torch

from vllm_w8a8_bismooth.serving.capture import Capture, write


@pytest.mark.parametrize("sizes", [(130,), (1, 129), (64, 64, 2), (130, 7), (50, 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_are_one_matrix(tmp_path, sizes, dtype):
    """Rows beyond those of the prompt are those of tokens that were generated."""
    logits = torch.randn(sum(sizes), 33, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    write(tmp_path / "scores.npy", list(logits.split(sizes)), 130)
    found = np.load(tmp_path / "scores.npy")
    assert found.dtype == np.float32 and found.shape == (130, 33)
    assert np.array_equal(found, logits[:130].float().log_softmax(-1).numpy())


def test_too_few_rows(tmp_path):
    with pytest.raises(RuntimeError, match="computed logits of 5 tokens where 6 were expected"):
        write(tmp_path / "scores.npy", [torch.zeros(5, 3)], 6)


def test_a_model_is_wrapped_once():
    class Model:
        computed = 0

        def compute_logits(self, states):
            self.computed += 1
            return states if states is not None else None

    class Worker(Capture):
        def __init__(self):
            self.model = Model()

        def get_model(self):
            return self.model

    worker = Worker()
    for _ in range(3):
        worker.bismooth_begin()
        first = worker.get_model().compute_logits(torch.ones(1, 2))
        assert torch.equal(first, torch.ones(1, 2)) and worker.model.compute_logits(None) is None
        assert len(worker._bismooth_calls) == 1
    assert worker.model.computed == 6
