"""Build the folder of data that `real_models.py`, `probe.py` and `token_rules.py` read, from clones of their sources.

    git clone https://github.com/openai/grade-school-math
    git clone https://github.com/arkilpatel/SVAMP
    git clone https://github.com/AGI-Edgerunners/LLM-Adapters
    python benchmarks/real_models_data.py --sources . --output measured/data
    python benchmarks/real_models.py --shared measured/ --models my-model/ --plan

GSM8K and SVAMP are copied as they are. LLM-Adapters' `math_data.json` has problems, their answers, and solutions that a
language model wrote: a solution is *correct* if the last number in it is within 1 % of the answer. That calls 17 of
3,057 solutions right that are off by less, such as 139 for 138. Problems whose answer is no number are left out.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

FILES = {  # in the sources' clones, and in the folder of data
    "grade-school-math/grade_school_math/data/train.jsonl": "gsm8k/train.jsonl",
    "grade-school-math/grade_school_math/data/test.jsonl": "gsm8k/test.jsonl",
    "grade-school-math/grade_school_math/data/example_model_solutions.jsonl": "gsm8k/example_model_solutions.jsonl",
    "SVAMP/SVAMP.json": "svamp/SVAMP.json",
}
PROBLEMS, LABELLED = "LLM-Adapters/math_data.json", "math_data/llm_adapters_math_labelled.jsonl"
NUMBER = re.compile(r"(-?)\$?(\d[\d,]*(?:\.\d+)?)")
TOLERANCE = 0.01


def main() -> None:
    args = _arguments()
    missing = [each for each in [*FILES, PROBLEMS] if not (args.sources / each).is_file()]
    if missing:
        sys.exit(f"'{args.sources}' has no '{missing[0]}': clone the sources into it, as --help says")
    for source, name in FILES.items():
        path = args.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(args.sources / source, path)
    tests = {json.loads(line)["question"] for line in (args.output / "gsm8k/test.jsonl").read_text().splitlines()}
    rows = labelled(json.loads((args.sources / PROBLEMS).read_text()), tests)
    path = args.output / LABELLED
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{args.output}: {len(rows)} labelled solutions, {sum(not row['correct'] for row in rows)} of them wrong")


def labelled(problems: list[dict[str, Any]], gsm8k_test: set[str]) -> list[dict[str, Any]]:
    """The problems whose answer is a number, with what their solutions say.

    Args:
        problems: each with an `instruction`, an `answer`, a list of one, and an `output`, the solution.
        gsm8k_test: the questions of GSM8K's test set.
    """
    found = []
    for problem in problems:
        gold = _as_number(problem["answer"][0]) if problem["answer"] else None
        if gold is None:
            continue
        question, solution = problem["instruction"].strip(), problem["output"].strip()
        said = last_number(solution)
        found.append(
            {
                "question": question,
                "solution": solution,
                "gold": gold,
                "pred": said,
                "correct": said is not None and abs(said - gold) <= TOLERANCE * abs(gold),
                "in_gsm8k_test": question in gsm8k_test,
            }
        )
    return found


def last_number(text: str) -> float | None:
    """The last number in a text, with the sign before it or before its dollar sign; None without any."""
    numbers = NUMBER.findall(text)
    return _as_number("".join(numbers[-1])) if numbers else None


def _as_number(value: Any) -> float | None:
    try:
        return float(str(value).replace(",", ""))
    except ValueError:
        return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, default=Path(), help="the folder of the three clones")
    parser.add_argument("--output", type=Path, required=True, help="the folder of data to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
