"""What ``bench kernels`` runs: every kernel of the decoder, in the sizes of real models.

A case counts the bytes that it must move and the multiplications and additions that it must do; the
roofline in ``kernels`` compares the time with what the machine gives. Exponentials, divisions and
comparisons count as one operation each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sagellm.bench.synthetic import random_matrix
from sagellm.errors import InvalidArgumentError
from sagellm.native import load_core

KERNELS = (
    "matmul",
    "attention",
    "rms_norm",
    "quantize",
    "rope",
    "silu_mul",
    "kv_write",
    "sampler",
)
FORMATS = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "BF16",
    "F16",
    "F32",
)

Arithmetic = Literal["f32", "bf16", "i8"]
Level = Literal["memory", "cache"]

_PAGE = 16  # tokens of a KV block


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """Attention of one layer of a real model, and how many layers it has."""

    kv_heads: int
    group: int
    head_dim: int
    layers: int


HEADS = {
    "SmolLM2-135M": HeadShape(kv_heads=3, group=3, head_dim=64, layers=30),
    "Qwen2.5-0.5B": HeadShape(kv_heads=2, group=7, head_dim=64, layers=24),
    "Gemma3-270M": HeadShape(kv_heads=1, group=4, head_dim=256, layers=18),
    "Llama-3-8B": HeadShape(kv_heads=8, group=4, head_dim=128, layers=32),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which cases, and how large.

    Attributes:
        only: Names of ``KERNELS``.
        threads: Numbers of threads.
        rows, columns, tokens, formats, precision: Of the matmul cases.
        contexts: Positions that a decoding token sees.
        prompts: Lengths of prefilled prompts.
        heads: Names of ``HEADS``.
        kv_dtypes: How keys and values are stored.
        widths: Row lengths of row-wise kernels.
        vocabularies: Logits of a row.
        working_set: Bytes of weights, or of keys and values, that are read in turn; more than the
            caches hold.
    """

    only: tuple[str, ...] = KERNELS
    threads: tuple[int, ...]
    rows: int = 4096
    columns: int = 1536
    tokens: tuple[int, ...] = (1, 8, 32, 256)
    formats: tuple[str, ...] = FORMATS
    precision: str = "a8"
    contexts: tuple[int, ...] = (256, 1024, 4096)
    prompts: tuple[int, ...] = (512, 2048)
    heads: tuple[str, ...] = tuple(HEADS)
    kv_dtypes: tuple[str, ...] = ("bf16", "int8")
    widths: tuple[int, ...] = (576, 4096)
    vocabularies: tuple[int, ...] = (49152, 262144)
    working_set: int = 128 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel on one problem.

    Attributes:
        bytes: That come from ``level`` or go there.
        ops: Multiplications and additions.
        level: Where the data is: memory, or each thread's cache.
        time: Runs it for so many seconds; seconds of one round (median, best) and their number.
    """

    kernel: str
    case: str
    threads: int
    bytes: int
    ops: int
    arithmetic: Arithmetic
    level: Level
    time: Callable[[float], dict[str, Any]]


def cases(selection: Selection, isa: str) -> Iterator[Case]:
    """Makes the cases one after the other, because matrices are large.

    Raises:
        InvalidArgumentError: An unknown kernel, format or size.
    """
    makers: dict[str, Callable[[Selection, str], Iterator[Case]]] = {
        "matmul": _matmul,
        "attention": _attention,
        "kv_write": _kv_write,
        "sampler": _sampler,
    }
    unknown = set(selection.only) - set(KERNELS)
    if unknown:
        raise InvalidArgumentError(
            f"no kernel {', '.join(sorted(unknown))}; choose from {', '.join(KERNELS)}"
        )
    for kernel in selection.only:
        if kernel in makers:
            yield from makers[kernel](selection, isa)
        else:
            yield from _rows(kernel, selection, isa)


def count(selection: Selection) -> int:
    """How many cases ``cases`` will make, for a progress bar."""
    pages = len(selection.heads) * len(selection.kv_dtypes)
    sizes = {
        "matmul": len(selection.formats) * len(selection.tokens),
        "attention": pages * (len(selection.contexts) + len(selection.prompts)),
        "kv_write": pages,
        "sampler": len(selection.vocabularies) * len(_RULES),
    }
    each = sum(sizes.get(kernel, len(selection.widths)) for kernel in selection.only)
    return each * len(selection.threads)


def _matmul(selection: Selection, isa: str) -> Iterator[Case]:
    core = load_core()
    rng = np.random.default_rng(0)
    rows, columns = selection.rows, selection.columns
    for name in selection.formats:
        raw = random_matrix(name, rows, columns, rng)
        packed = core.quant.pack(name, raw, rows, columns)
        copies = -(-selection.working_set // packed.nbytes)
        for tokens in selection.tokens:
            for threads in selection.threads:

                def time(
                    seconds: float,
                    packed: Any = packed,
                    tokens: int = tokens,
                    threads: int = threads,
                    copies: int = copies,
                ) -> dict[str, Any]:
                    return dict(
                        core.kernels.time_matmul(
                            isa, packed, tokens, threads, seconds, selection.precision, copies
                        )
                    )

                yield Case(
                    kernel="matmul",
                    case=f"{name} [{rows}, {columns}] x {tokens}",
                    threads=threads,
                    bytes=packed.nbytes,
                    ops=2 * rows * columns * tokens,
                    arithmetic=core.kernels.arithmetic_of(isa, packed),
                    level="memory",
                    time=time,
                )


def _attention(selection: Selection, isa: str) -> Iterator[Case]:
    arithmetic: Arithmetic = "bf16" if isa == "avx512_bf16" else "f32"
    sizes = [(context, 1) for context in selection.contexts]
    sizes += [(prompt, prompt) for prompt in selection.prompts]
    for name, dtype in itertools.product(selection.heads, selection.kv_dtypes):
        shape = HEADS[name]
        for context, tokens in sizes:
            layer = context * _token_bytes(shape, dtype)
            layers = sequences = 1
            if tokens == 1:  # prefill reads what it has just written
                layers = min(shape.layers, -(-selection.working_set // layer))
                sequences = -(-selection.working_set // (layers * layer))
            seen = sum(range(context - tokens + 1, context + 1))  # pairs of query and key
            phase = "decode" if tokens == 1 else "prefill"
            for threads in selection.threads:
                yield Case(
                    kernel="attention",
                    case=f"{name} {dtype} {phase} {context}",
                    threads=threads,
                    bytes=layer,
                    ops=4 * shape.kv_heads * shape.group * shape.head_dim * seen,
                    arithmetic=arithmetic,
                    level="memory" if tokens == 1 else "cache",
                    time=_time_pages(
                        "time_attention",
                        isa,
                        shape,
                        dtype,
                        tokens=(context, tokens),
                        threads=threads,
                        copies=(layers, sequences),
                    ),
                )


def _token_bytes(shape: HeadShape, dtype: str) -> int:
    """K and V of one token in one layer, scales included."""
    block = load_core().kv.bytes_per_block(
        num_slots=1,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        block_size=_PAGE,
        dtype=dtype,
    )
    return int(block) // _PAGE


def _time_pages(
    function: str,
    isa: str,
    shape: HeadShape,
    dtype: str,
    *,
    tokens: tuple[int, int],
    threads: int,
    copies: tuple[int, int] = (1, 1),
) -> Callable[[float], dict[str, Any]]:
    """Times a kernel on pages: ``tokens`` are context and queries, ``copies`` layers, sequences."""

    def time(seconds: float) -> dict[str, Any]:
        return dict(
            getattr(load_core().kernels, function)(
                isa,
                kv_heads=shape.kv_heads,
                group=shape.group,
                head_dim=shape.head_dim,
                context=tokens[0],
                num_tokens=tokens[1],
                threads=threads,
                seconds=seconds,
                layers=copies[0],
                sequences=copies[1],
                kv_dtype=dtype,
            )
        )

    return time


def _kv_write(selection: Selection, isa: str) -> Iterator[Case]:
    context, tokens = 512, 64
    for name, dtype in itertools.product(selection.heads, selection.kv_dtypes):
        shape = HEADS[name]
        values = 2 * shape.kv_heads * shape.head_dim * tokens
        for threads in selection.threads:
            yield Case(
                kernel="kv_write",
                case=f"{name} {dtype} {tokens} tokens",
                threads=threads,
                bytes=4 * values + tokens * _token_bytes(shape, dtype),
                ops=values,
                arithmetic="f32",
                level="cache",
                time=_time_pages(
                    "time_kv_write", isa, shape, dtype, tokens=(context, tokens), threads=threads
                ),
            )


# Bytes moved and operations done per value of a row.
_ROW_COSTS = {
    "rms_norm": (8, 4),
    "quantize": (5, 5),
    "rope": (12, 3),
    "silu_mul": (12, 4),
}
_ROW_VALUES = 1 << 14  # per thread and round: they stay in the cache


def _rows(kernel: str, selection: Selection, isa: str) -> Iterator[Case]:
    per_value, ops = _ROW_COSTS[kernel]
    for width in selection.widths:
        rows = max(1, _ROW_VALUES // width)
        for threads in selection.threads:

            def time(
                seconds: float, rows: int = rows, width: int = width, threads: int = threads
            ) -> dict[str, Any]:
                kernels = load_core().kernels
                return dict(kernels.time_rows(isa, kernel, rows, width, threads, seconds))

            values = rows * width * threads
            yield Case(
                kernel=kernel,
                case=f"{rows} rows of {width}" + (" per thread" if threads > 1 else ""),
                threads=threads,
                bytes=per_value * values,
                ops=ops * values,
                arithmetic="f32",
                level="cache",
                time=time,
            )


# Temperature, top-k, top-p.
_RULES = {
    "greedy": (0.0, 0, 1.0),
    "top-k 50": (1.0, 50, 1.0),
    "top-p 0.95": (1.0, 0, 0.95),
    "top-k 50, top-p 0.95": (1.0, 50, 0.95),
}


def _sampler(selection: Selection, isa: str) -> Iterator[Case]:
    for vocabulary in selection.vocabularies:
        for rule, (temperature, top_k, top_p) in _RULES.items():
            for threads in selection.threads:

                def time(
                    seconds: float,
                    vocabulary: int = vocabulary,
                    rule: tuple[float, int, float] = (temperature, top_k, top_p),
                    threads: int = threads,
                ) -> dict[str, Any]:
                    kernels = load_core().kernels
                    return dict(kernels.time_sampler(isa, vocabulary, *rule, threads, seconds))

                yield Case(
                    kernel="sampler",
                    case=f"{rule}, {vocabulary} logits" + (" per thread" if threads > 1 else ""),
                    threads=threads,
                    bytes=4 * vocabulary * threads,
                    ops=vocabulary * threads,
                    arithmetic="f32",
                    level="cache",
                    time=time,
                )
