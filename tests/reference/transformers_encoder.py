"""States and scores of the tiny encoders by Hugging Face transformers, the independent oracle.

As a program it rewrites the stored goldens, with which machines without torch compare::

    PYTHONPATH=python:tests python tests/reference/transformers_encoder.py

Written with torch 2.13.0 and transformers 5.23.0.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.make_tiny_encoder import make_tiny_encoder

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "encoder"
CASES: dict[str, dict[str, Any]] = {
    "bert": {"prefix": "bert."},
    "bert_head": {"has_head": True, "prefix": "bert.", "hidden_size": 48, "seed": 3},
    "roberta_head": {"architecture": "roberta", "has_head": True, "prefix": "roberta."},
    "xlm_roberta": {"architecture": "xlm-roberta", "norm_eps": 1e-5, "seed": 5},
}


def case_input(name: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Token ids and types of one sequence; 1 is left out, which RoBERTa takes for padding."""
    rng = np.random.default_rng(len(name))
    ids = rng.integers(2, 128, 37).astype(np.int32)
    types = np.zeros_like(ids)
    if name.startswith("bert"):
        types[20:] = 1
    return ids, types


def transformers_outputs(
    folder: Path, ids: NDArray[np.int32], types: NDArray[np.int32]
) -> dict[str, NDArray[np.float64]]:
    """``hidden`` [tokens, hidden] and, with a head, ``score`` [1], in float64, eager attention."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder)
    kind = AutoModel
    if config.architectures[0].endswith("ForSequenceClassification"):
        kind = AutoModelForSequenceClassification
    model = kind.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    model.eval()
    arguments = {
        "input_ids": torch.from_numpy(ids[None].astype(np.int64)),
        "token_type_ids": torch.from_numpy(types[None].astype(np.int64)),
    }
    with torch.inference_mode():
        output = model(**arguments, output_hidden_states=True)
    outputs = {"hidden": output.hidden_states[-1][0].numpy()}
    if kind is AutoModelForSequenceClassification:
        outputs["score"] = output.logits[0].numpy()
    return outputs


def main() -> None:
    """Rewrites every golden."""
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for name, options in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = make_tiny_encoder(Path(scratch) / name, **options)
            outputs = transformers_outputs(folder, *case_input(name))
        np.savez_compressed(
            GOLDENS / f"{name}.npz", **{k: v.astype(np.float32) for k, v in outputs.items()}
        )
        print(name, {key: (value.shape, float(value.std())) for key, value in outputs.items()})


if __name__ == "__main__":
    main()
