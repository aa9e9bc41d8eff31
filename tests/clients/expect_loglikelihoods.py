"""Log-likelihoods of the choices of lm_eval_items.json from offline logits, without a server.

expect_loglikelihoods.py MODEL OUTPUT.json, in the environment of sagellm.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from sagellm import LLM

ITEMS = Path(__file__).with_name("lm_eval_items.json")


def loglikelihood(llm: LLM, context: str, continuation: str) -> float:
    """Sum of the log-probabilities of the continuation's tokens."""
    prefix = llm.tokenizer.encode(context, add_special=False)
    whole = llm.tokenizer.encode(context + continuation, add_special=False)
    assert whole[: len(prefix)] == prefix
    logits = llm.logits(whole).astype(np.float64)
    total = 0.0
    for place in range(len(prefix), len(whole)):
        row = logits[place - 1]
        peak = row.max()
        total += row[whole[place]] - peak - np.log(np.exp(row - peak).sum())
    return float(total)


def main() -> None:
    """Writes one list of numbers per item."""
    model, output = sys.argv[1:]
    items = json.loads(ITEMS.read_text())
    with LLM(model) as llm:
        found = [
            [loglikelihood(llm, item["question"], f" {choice}") for choice in item["choices"]]
            for item in items
        ]
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
