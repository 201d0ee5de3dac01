"""What a model card says of the original that its files may not show: its place on the Hub and its licence."""

from dataclasses import dataclass, replace

from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.report import licence


@dataclass(frozen=True)
class Labels:
    """Labels of a card. They change the card alone, never the weights, and are no part of a recipe.

    Attributes:
        base_model: the original's id on the Hub, ``org/name``; ``None`` says nothing.
        license: the original's licence, as an id of the Hub (:data:`licence.HUB`) or an SPDX identifier, which becomes
            the Hub's id; ``None`` says nothing.

    Raises:
        BismoothError: on construction, if one of them is neither.
        TypeError: one of them is no string.
    """

    base_model: str | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        for label, value in vars(self).items():
            if not isinstance(value, str | None):
                raise TypeError(f"{label} must be a string, not {value!r}")
        name = self.base_model
        if name is not None and not _names_a_model(name):
            what = "not the name of a model on the Hub"
            raise BismoothError.of(f"--base-model {name!r}", what, "write org/name, as in the address of its page")
        if self.license is not None:
            if (found := licence.hub_id(self.license)) is None:
                raise BismoothError.of(
                    f"--license {self.license!r}",
                    "neither a licence id of the Hub nor the SPDX identifier of one",
                    "choose one of https://huggingface.co/docs/hub/repositories-licenses, or write other",
                )
            object.__setattr__(self, "license", found)

    def over(self, before: "Labels") -> "Labels":
        """These, and where they say nothing what was said before."""
        return replace(before, **{key: value for key, value in vars(self).items() if value is not None})


def _names_a_model(name: str) -> bool:
    """Whether there can be ``org/name`` on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name
