"""What of the calibration text was really used, for people and for report.json."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm_w8a8_bismooth.measure import bundled


@dataclass(frozen=True)
class Used:
    """What of the calibration text was really used.

    Attributes:
        files: names, without folders.
        rows, skipped, reason: see :class:`text.Read`, over all files.
        documents: rows that the tokens come from.
        windows, tokens: how many there are.
        left_out: windows that were left out for token ids that the embedding lacks.
        plain_chats: of the documents, chats whose turns were joined by line ends, because the checkpoint's chat
            template is not there, or refused them.
        template: why, for the first of them; ``None`` if there is none.
    """

    files: tuple[str, ...]
    rows: int
    skipped: int
    reason: str | None
    documents: int
    windows: int
    tokens: int
    left_out: int = 0
    plain_chats: int = 0
    template: str | None = None

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "Used":
        """From what :meth:`json` gave."""
        return cls(**{**stored, "files": tuple(stored["files"])})

    def json(self) -> dict[str, Any]:
        """For report.json; :meth:`of` is the way back."""
        return asdict(self) | {"files": list(self.files)}

    def words(self) -> str:
        """How much of what, for people."""
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.tokens} tokens of {self.files[0]}{more}"

    def remarks(self) -> list[str]:
        """Whatever was not used as it is, in sentences; empty if all was."""
        found = []
        if self.skipped:
            found.append(
                f"Skipped {self.skipped} of {self.rows + self.skipped} rows of calibration text ({self.reason})"
            )
        if self.plain_chats and self.files != (bundled.NAME,):  # whose chats nobody gave for their template
            found.append(f"Joined {self.plain_chats} chats by line ends, without a chat template ({self.template})")
        if self.left_out:
            found.append(f"Left out {self.left_out} windows with token ids that the embedding lacks")
        return found
