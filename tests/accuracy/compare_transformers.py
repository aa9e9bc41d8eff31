"""Compares sagellm with Hugging Face transformers in float32 on the same (dequantized) weights.

Run by hand (needs ``pip install torch==2.13.0 transformers gguf``):

    python tests/accuracy/compare_transformers.py PATH.gguf [--precision a15] [--kv-dtype int8]

transformers reads the GGUF file itself, so the tensor mapping, the dequantizer and the model are
independent of
ours. Reported per model: mean KL(reference || sagellm) over all positions in nats, top-1 agreement,
perplexity of both
on the same text, and how far 64 greedy tokens agree over 8 prompts. A greedy text may leave the
reference after a near tie:
``first_gap`` is the reference's logit difference between both choices at the first disagreement.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from sagellm import LLM

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea,",
    "The three laws of motion were written by",
    "def fibonacci(n):\n",
    "To make bread, you need flour, water,",
    "In 1969, the first human being",
    "The quick brown fox",
)
TEXT = (Path(__file__).parent / "text.txt").read_text(encoding="utf-8")


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural-log probabilities in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def reference_logits(model: torch.nn.Module, ids: list[int]) -> NDArray[np.float32]:
    """Float32 logits of every position from transformers."""
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0].float().numpy())


def compare_logits(model: torch.nn.Module, llm: LLM, ids: list[int]) -> dict[str, float]:
    """KL, top-1 agreement and perplexities over one token sequence."""
    expected = log_softmax(reference_logits(model, ids))
    got = log_softmax(llm.logits(ids))
    kl = (np.exp(expected) * (expected - got)).sum(axis=-1)
    target = np.array(ids[1:])
    rows = np.arange(len(target))
    ppl_expected = float(np.exp(-expected[rows, target].mean()))
    ppl_got = float(np.exp(-got[rows, target].mean()))
    return {
        "tokens": len(ids),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1": float((expected.argmax(-1) == got.argmax(-1)).mean()),
        "ppl_reference": ppl_expected,
        "ppl": ppl_got,
        "ppl_change": ppl_got / ppl_expected - 1,
    }


def compare_greedy(
    model: torch.nn.Module, llm: LLM, ids: list[int], count: int
) -> dict[str, float]:
    """Agreement of ``count`` greedy tokens after ``ids``."""
    response = llm.generate([ids], max_tokens=count, temperature=None, ignore_eos=True)[0]
    ours = response.output_tokens
    # The reference's choice at every position of our own continuation: agreement token by token.
    logits = reference_logits(model, ids + ours)[len(ids) - 1 : -1]
    choice = logits.argmax(-1)
    same = choice == np.array(ours)
    first = int(np.argmin(same)) if not same.all() else len(ours)
    gap = 0.0 if same.all() else float(logits[first].max() - logits[first][ours[first]])
    return {"agree": float(same.mean()), "first_disagreement": first, "first_gap": gap}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--precision", default="a8")
    parser.add_argument("--kv-dtype", default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.gguf.parent, gguf_file=args.gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    options = {}
    if args.device == "cpu":
        options = {"precision": args.precision, "kv_dtype": args.kv_dtype}
    with LLM(str(args.gguf), device=args.device, **options) as llm:
        ids = llm.tokenizer.encode(TEXT, add_special=True)[:1024]
        report: dict[str, object] = {"model": args.gguf.name, "precision": args.precision}
        report["kv_dtype"] = llm.engine.runner.kv_dtype
        report.update(compare_logits(model, llm, ids))
        greedy = [
            compare_greedy(model, llm, llm.tokenizer.encode(p, add_special=True), 64)
            for p in PROMPTS
        ]
    report["greedy_agree"] = float(np.mean([g["agree"] for g in greedy]))
    report["greedy"] = greedy
    print(json.dumps(report) if args.json else json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
