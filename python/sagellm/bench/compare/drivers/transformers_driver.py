"""transformers: ``generate`` of an AutoModelForCausalLM, eager, in the folder's own data type."""

from __future__ import annotations

import importlib
import time
from typing import Any


def load(spec: dict[str, Any]) -> TransformersEngine:
    """Loads the folder with PyTorch."""
    return TransformersEngine(spec)


class TransformersEngine:
    """See ``drive.py``."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.transformers: Any = importlib.import_module("transformers")
        self.torch.set_num_threads(spec["threads"])
        self.torch.set_grad_enabled(False)
        self.model = self.transformers.AutoModelForCausalLM.from_pretrained(
            spec["model"], dtype="auto"
        ).eval()
        self.vocab_size = self.model.config.vocab_size
        self.model.generation_config.eos_token_id = None  # answers have the length asked

    def generate(
        self, prompts: list[list[int]], output_tokens: int
    ) -> tuple[float, float, float, int]:
        """See ``drive.py``."""
        times: list[float] = []

        class Clock(self.transformers.StoppingCriteria):  # type: ignore[misc, name-defined]
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                times.append(time.perf_counter())  # one token more for every stream
                return input_ids.new_zeros(input_ids.shape[0], dtype=bool_type)

        bool_type = self.torch.bool
        ids = self.torch.tensor(prompts)
        start = time.perf_counter()
        output = self.model.generate(
            ids,
            attention_mask=self.torch.ones_like(ids),
            max_new_tokens=output_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=self.transformers.StoppingCriteriaList([Clock()]),
        )
        if output.shape[1] - ids.shape[1] != output_tokens:
            raise RuntimeError(f"transformers gave {output.shape[1] - ids.shape[1]} tokens")
        return start, times[0], times[-1], len(prompts) * (len(times) - 1)

    def facts(self) -> dict[str, Any]:
        """What runs."""
        return {
            "version": self.transformers.__version__,
            "torch": self.torch.__version__,
            "dtype": str(self.model.dtype),
        }
