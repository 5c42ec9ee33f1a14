"""Small tasks of lm-eval in local files: multiple choice, a perplexity, and one whose data is missing."""

import json
from pathlib import Path

from tests.molt_lens.host_models import tiny_text

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/words.jsonl}}
  cache_dir: {folder}/cache
output_type: {output_type}
test_split: test
doc_to_text: "{text}"
doc_to_target: "{target}"
"""
CHOICES = """
doc_to_choice: "{{ choices }}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
PERPLEXITY = "metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]\n"


def write_tasks(folder: Path) -> Path:
    """Tasks `words`, `rolling` and `missing`, with five documents."""
    documents = [
        {"q": tiny_text(20, seed=i), "choices": [f" {tiny_text(n, seed=i + n)}" for n in (4, 5, 6)], "label": i % 3}
        for i in range(5)
    ]
    (folder / "words.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    choice = TASK.format(name="words", folder=folder, output_type="multiple_choice", text="{{q}}", target="{{label}}")
    rolling = TASK.format(name="rolling", folder=folder, output_type="loglikelihood_rolling", text="", target="{{q}}")
    missing = choice.replace("task: words", "task: missing").replace("words.jsonl", "absent.jsonl")
    for name, text in {"words": choice + CHOICES, "rolling": rolling + PERPLEXITY, "missing": missing}.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder
