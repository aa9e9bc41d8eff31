"""Logits of the tiny models by Hugging Face transformers, the independent oracle.

As a program it rewrites the stored goldens, with which machines without torch compare::

    PYTHONPATH=python:tests python tests/reference/transformers_logits.py

Written with torch 2.13.0 and transformers 5.23.0.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.make_tiny import make_tiny_hf
from reference.cases import CASES, GOLDEN_COLUMNS, case_tokens

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "reference"


def transformers_logits(folder: Path, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits ``[tokens, vocab]`` in float32, eager attention, whole sequence at once."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    with torch.inference_mode():
        output = model(torch.from_numpy(tokens[None].astype(np.int64)), use_cache=False)
    logits: NDArray[np.float32] = output.logits[0].float().numpy()
    return logits


def main() -> None:
    """Rewrites every golden."""
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = make_tiny_hf(Path(scratch) / name, case.arch, seed=case.seed, **case.dims)
            logits = transformers_logits(folder, case_tokens(case))
        np.savez_compressed(GOLDENS / f"{name}.npz", logits=logits[:, :GOLDEN_COLUMNS])
        print(f"{name}: {logits.shape}, standard deviation {logits.std():.3f}")


if __name__ == "__main__":
    main()
