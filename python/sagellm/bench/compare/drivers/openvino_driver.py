"""openvino-genai: its ContinuousBatchingPipeline on the GGUF file itself, stepped from here."""

from __future__ import annotations

import importlib
import time
from typing import Any


def load(spec: dict[str, Any]) -> OpenVinoEngine:
    """Converts the GGUF file in memory, as the library does."""
    return OpenVinoEngine(spec)


class OpenVinoEngine:
    """See ``drive.py``."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.numpy: Any = importlib.import_module("numpy")
        self.openvino: Any = importlib.import_module("openvino")
        self.genai: Any = importlib.import_module("openvino_genai")
        scheduler = self.genai.SchedulerConfig()
        scheduler.max_num_seqs = spec["max_streams"]
        scheduler.max_num_batched_tokens = spec["max_tokens"]  # a prompt is never cut
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": spec["threads"]}
        self.pipeline = self.genai.ContinuousBatchingPipeline(
            spec["model"], scheduler, "CPU", properties
        )
        self.vocab_size = len(self.pipeline.get_tokenizer().get_vocab())
        self.next_id = 0

    def generate(
        self, prompts: list[list[int]], output_tokens: int
    ) -> tuple[float, float, float, int]:
        """See ``drive.py``."""
        config = self.genai.GenerationConfig()
        config.max_new_tokens = output_tokens
        config.ignore_eos = True
        config.do_sample = False
        start = time.perf_counter()
        handles = []
        for prompt in prompts:
            ids = self.openvino.Tensor(self.numpy.array([prompt], self.numpy.int64))
            handles.append(self.pipeline.add_request(self.next_id, ids, config))
            self.next_id += 1
        first = None
        count = before = 0
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            if first is None and all(handle.can_read() for handle in handles):
                first = time.perf_counter()
        end = time.perf_counter()
        for handle in handles:
            count += sum(len(output.generated_ids) for output in handle.read_all())
        if first is None or count != len(prompts) * output_tokens:
            raise RuntimeError(f"openvino-genai gave {count} tokens")
        before = len(prompts)
        return start, first, end, count - before

    def facts(self) -> dict[str, Any]:
        """What runs."""
        return {"version": self.genai.__version__, "openvino": self.openvino.__version__}
