"""Compares an encoder with Hugging Face transformers in float32 (torch on the CPU).

Run by hand (needs ``pip install torch==2.13.0 transformers``):

    python tests/accuracy/compare_encoder.py [MODEL] [--threads 2] [--device cpu] [--json]

MODEL is a catalogue name or a folder (default ``minilm``). Both sides get the same 100 sentences,
made here from a fixed seed: 1 to 250 words, so that lengths vary as texts do. The reference pools
and normalises as the model's sentence-transformers files say, which is written out again here.
Reported: the least and mean cosine of the vectors of both, and with ``--repeat`` the sentences and
tokens per second of each, in rounds that alternate: ours as one request, the reference in batches
of 32 sorted by length, which is what sentence-transformers does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from sagellm.checkpoint.encoder import EncoderConfig, open_encoder
from sagellm.checkpoint.resolve import resolve_model
from sagellm.engine.embedding import EncoderEmbedder, load_embedder

NUM_SENTENCES = 100
REFERENCE_BATCH = 32
_TEXT = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point
home water room mother area money story fact month lot right study book eye job word business issue
side kind head house service friend father power hour game line end member law car city community
name president team minute idea body information back parent face others level office door health
reason research girl guy moment air teacher force education quickly never often measures explains
carries breaks builds 17 1998 3.5 naïve Zürich 東京 quantization e-mail
"""
_WORDS = _TEXT.split()


def make_sentences(count: int = NUM_SENTENCES, seed: int = 0) -> list[str]:
    """Word salad of 1 to 250 words, most of it short."""
    rng = random.Random(seed)
    lengths = [max(1, round(250 * rng.random() ** 2.5)) for _ in range(count)]
    return [" ".join(rng.choices(_WORDS, k=length)).capitalize() + "." for length in lengths]


class Reference:
    """transformers and torch, with the pooling of sentence-transformers."""

    def __init__(self, path: str, config: EncoderConfig) -> None:
        self.config = config
        self.model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32)
        self.model.eval()

    def embed(self, prompts: list[list[int]]) -> NDArray[np.float32]:
        """Vectors of all prompts, in batches of similar lengths."""
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        rows: list[Any] = [None] * len(prompts)
        for start in range(0, len(order), REFERENCE_BATCH):
            chosen = order[start : start + REFERENCE_BATCH]
            for index, row in zip(chosen, self._batch([prompts[i] for i in chosen]), strict=True):
                rows[index] = row
        return np.stack(rows)

    def _batch(self, prompts: list[list[int]]) -> NDArray[np.float32]:
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
            mask[row, : len(prompt)] = 1
        with torch.inference_mode():
            states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        if self.config.pooling == "cls":
            pooled = states[:, 0]
        else:
            weights = mask.unsqueeze(-1).float()
            pooled = (states * weights).sum(1) / weights.sum(1)
        if self.config.normalize:
            pooled = torch.nn.functional.normalize(pooled, dim=1)
        rows: NDArray[np.float32] = pooled.numpy()
        return rows


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of corresponding rows."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.asarray((x * y).sum(axis=1) / norms)


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(embedder: EncoderEmbedder, reference: Reference, repeat: int) -> dict[str, Any]:
    """Everything that is reported."""
    limit = embedder.max_tokens
    prompts = [embedder.encode(text, truncate_tokens=limit) for text in make_sentences()]
    loop = asyncio.new_event_loop()

    def ours() -> NDArray[np.float32]:
        return loop.run_until_complete(embedder.embed(prompts))

    def theirs() -> NDArray[np.float32]:
        return reference.embed(prompts)

    similarity = cosines(ours(), theirs())
    tokens = sum(map(len, prompts))
    report: dict[str, Any] = {
        "model": embedder.model_name,
        "device": embedder.device,
        "sentences": len(prompts),
        "tokens": tokens,
        "cosine_min": float(similarity.min()),
        "cosine_mean": float(similarity.mean()),
    }
    if repeat:
        rounds = [(seconds(ours), seconds(theirs)) for _ in range(repeat)]
        for name, times in zip(("sagellm", "reference"), zip(*rounds, strict=True), strict=True):
            median = statistics.median(times)
            report[f"{name}_sentences_per_s"] = round(len(prompts) / median, 1)
            report[f"{name}_tokens_per_s"] = round(tokens / median)
        report["speedup"] = round(statistics.median(b / a for a, b in rounds), 3)
    loop.run_until_complete(embedder.close())
    loop.close()
    return report


def main() -> None:
    """Prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="minilm")
    parser.add_argument("--threads", type=int, default=2, help="of both sides")
    parser.add_argument("--device", default="cpu", help="cpu or reference")
    parser.add_argument("--isa", help="instruction set of ours")
    parser.add_argument(
        "--repeat", type=int, default=0, help="timed rounds; 0 measures accuracy only"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = resolve_model(args.model)
    threads = None if args.device == "reference" else args.threads
    embedder = load_embedder(path, device=args.device, threads=threads, isa=args.isa)
    reference = Reference(str(path), open_encoder(path).config)
    report = compare(embedder, reference, args.repeat)
    if args.json:
        print(json.dumps(report))
    else:
        for key, value in report.items():
            print(f"{key:28} {value}")


if __name__ == "__main__":
    main()
