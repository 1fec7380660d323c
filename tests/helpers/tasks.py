"""Task files of lm-evaluation-harness."""

from __future__ import annotations

import json

from resofilter_trainer.demo.problems import make_problems

SUMS = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/problems.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion.split('#### ')[1]}}}}"
generation_kwargs: {{until: ["<|end|>"], do_sample: false, max_gen_toks: 56}}
filter_list:
  - name: final
    filter: [{{function: regex, regex_pattern: "#### (-?[0-9]+)"}}, {{function: take_first}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


CHOICES = """task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/problems.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: ["1+1", "zebra"]
doc_to_target: 0
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


BOTH = """group: both
task: [sums, choices]
"""


def write_tasks(folder):
    """Write two tasks and a group of both, on a few problems of the demo. Returns their folder."""
    where = folder / "tasks"
    where.mkdir()
    lines = [json.dumps({"prompt": p.prompt, "completion": p.completion}) for p in make_problems(12, seed=5)]
    (where / "problems.jsonl").write_text("\n".join(lines))
    (where / "sums.yaml").write_text(SUMS.format(folder=where))
    (where / "choices.yaml").write_text(CHOICES.format(folder=where))
    (where / "both.yaml").write_text(BOTH)
    return where
