"""What a model predicts from what its last block leaves, and how that depends on it."""

from typing import Any

import torch

from vllm_w8a8_bismooth.checkpoint.layout import Layout, Source
from vllm_w8a8_bismooth.measure import own
from vllm_w8a8_bismooth.measure.text import refused, transformers_config
from vllm_w8a8_bismooth.model.classes import head_of

_SEED = 0


def predicts_tokens(source: Layout) -> bool:
    """Whether the model ends in a language model's head, rather than a classifier's or none."""
    return head_of(source.checkpoint.config) == "language"


class Logits:
    """The norm behind the last block and the language model's head, with all that the model does there to its logits.

    A model without such a head has its last hidden states, as the norm leaves them, in place of logits; so has one
    whose class, of its own code, does not say which module its head is.

    Args:
        source: whose norm and head are read.
        device: where they work.
        dtype: in which they compute; the head is held in it.

    Raises:
        BismoothError: transformers refuses the config.
    """

    @torch.no_grad()
    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype):
        from transformers import AutoModel, AutoModelForCausalLM

        checkpoint, names = source.checkpoint, source.names
        language = predicts_tokens(source)
        config = transformers_config(checkpoint)
        try:
            model: Any = own.language_model(checkpoint, dtype)
            if model is None:
                with torch.device("meta"):
                    build = AutoModelForCausalLM if language else AutoModel
                    model = build.from_config(config, dtype=dtype).eval()
            model.requires_grad_(False)
        except Exception as error:
            raise refused(checkpoint, error) from None

        def lend(module: torch.nn.Module, name: str) -> torch.nn.Module:
            stored = {key: f"{name.removesuffix('weight')}{key}" for key in module.state_dict()}
            lent = {key: checkpoint.read(full).to(device, dtype) for key, full in stored.items()}
            module.load_state_dict(lent, assign=True)
            return module.requires_grad_(False)

        construction = source.construction
        self.language = language and model.get_output_embeddings() is not None
        decoder = model.get_submodule(construction.decoder.removesuffix(".")) if language else model
        self._norm: torch.nn.Module = torch.nn.Identity()
        if construction.norm is not None and names.norm is not None:
            self._norm = lend(decoder.get_submodule(construction.norm), names.norm)
        self._model = model
        if self.language:
            head = names.head if names.head in checkpoint.headers else names.embedding
            lend(model.get_output_embeddings(), head)
            model.set_submodule(construction.decoder.removesuffix("."), _Ending(self._norm))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 ``[windows, length, vocabulary]`` of ``[windows, length, hidden]``, or the normed hidden states."""
        if not self.language:
            return self._norm(hidden).float()
        return self._model(inputs_embeds=hidden, use_cache=False).logits.float()

    def gradients(self, hidden: torch.Tensor, draws: int) -> torch.Tensor:
        """The gradient of the log-probability of tokens that the model itself would say.

        Their outer products are the Fisher information of the predictions: half the mean square of a small change's
        product with them is the KL divergence that it causes (Amari 1998; used for pruning in arXiv 1801.05787). Of
        hidden states in place of logits, whose size is made 1, it is half the square of the change of these.

        Args:
            hidden: ``[windows, length, hidden]``, what the last block left.
            draws: tokens drawn at each place, the same ones every time.

        Returns:
            fp32 ``[draws, windows, length, hidden]``.
        """
        random = torch.Generator(hidden.device).manual_seed(_SEED)
        found = torch.empty(draws, *hidden.shape, device=hidden.device)
        for index, window in enumerate(hidden.split(1)):
            leaf = window.detach().requires_grad_()
            with torch.enable_grad():
                chances = self._log_chances(leaf, draws, random)
                for draw in range(draws):
                    (gradient,) = torch.autograd.grad(chances[draw], leaf, retain_graph=draw < draws - 1)
                    found[draw, index] = gradient[0].float()
        return found

    def _log_chances(self, hidden: torch.Tensor, draws: int, random: torch.Generator) -> list[torch.Tensor]:
        """Of one window: for each draw the sum over its places, a number."""
        outputs = self(hidden)[0]
        if not self.language:
            size = outputs.detach().square().sum(dim=-1, keepdim=True).sqrt()
            noise = [torch.randn(outputs.shape, generator=random, device=hidden.device) for _ in range(draws)]
            return [(outputs * (each / size)).sum() for each in noise]
        logarithms = outputs.log_softmax(dim=-1)
        tokens = torch.multinomial(logarithms.detach().exp(), draws, replacement=True, generator=random)
        return list(logarithms.gather(-1, tokens).sum(dim=0))


class _Ending(torch.nn.Module):
    """Stands in for the decoder of a model: what it is given went through the blocks already."""

    def __init__(self, norm: torch.nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, inputs_embeds: torch.Tensor, **_: object):
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=self.norm(inputs_embeds))
