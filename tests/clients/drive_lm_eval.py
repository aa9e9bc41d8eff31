"""lm-eval's local-completions against a running server: drive_lm_eval.py URL MODEL EXPECTED.json.

The task is made of lm_eval_items.json; nothing is downloaded. EXPECTED.json comes from
expect_loglikelihoods.py: the log-likelihoods and the accuracy over HTTP are those offline.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import lm_eval
from checks import run, server_and_model
from lm_eval.tasks import TaskManager

URL, MODEL = server_and_model()
NAME = "sagellm_facts"
TOLERANCE = 1e-3
HERE = Path(__file__).parent
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
"""


def evaluate(**options: Any) -> dict[str, Any]:
    items = json.loads((HERE / "lm_eval_items.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        data = Path(folder, "items.jsonl")
        data.write_text("".join(json.dumps(item) + "\n" for item in items))
        Path(folder, f"{NAME}.yaml").write_text(TASK.format(name=NAME, data=data))
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": MODEL,
                "base_url": f"{URL}/v1/completions",
                "max_retries": 1,
                **options,
            },
            tasks=[NAME],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
    return found


def compare(found: dict[str, Any]) -> None:
    expected = json.loads(Path(sys.argv[3]).read_text())
    samples = sorted(found["samples"][NAME], key=lambda sample: int(sample["doc_id"]))
    assert len(samples) == len(expected)
    right = 0
    for sample, wanted in zip(samples, expected, strict=True):
        measured = [float(response[0]) for response in sample["filtered_resps"]]
        worst = max(abs(a - b) for a, b in zip(measured, wanted, strict=True))
        assert worst <= TOLERANCE, (sample["doc"]["question"], measured, wanted)
        right += wanted.index(max(wanted)) == sample["doc"]["answer"]
    accuracy = found["results"][NAME]["acc,none"]
    assert accuracy == right / len(expected), (accuracy, right)
    print(f"     accuracy {accuracy:.3f}, as offline")


def loglikelihoods_are_those_of_offline_logits() -> None:
    compare(evaluate())


def batches_and_requests_at_once_change_nothing() -> None:
    compare(evaluate(num_concurrent=4, batch_size=4))


if __name__ == "__main__":
    run(
        "lm-eval",
        (loglikelihoods_are_those_of_offline_logits, batches_and_requests_at_once_change_nothing),
    )
