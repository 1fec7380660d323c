"""The exact match of final answers, as an `evaluate` module. Knows text, no model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

import datasets
import evaluate

MARKED = re.compile(r"(?:####|[Tt]he answer is:?)\s*(-?)\s*\$?\s*(-?[\d,]*\.?\d+)")


def final_answer(text: str) -> Decimal | None:
    """The number after the last `####` (GSM8K) or `The answer is` (MetaMathQA); None without such a number."""
    found = MARKED.findall(text)
    try:
        return Decimal("".join(found[-1]).replace(",", "")) if found else None
    except InvalidOperation:
        return None


class FinalAnswer(evaluate.Metric):
    """The share of predictions with the final answer of the reference; a prediction without a final answer is wrong."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Exact match of the number after the last '####' or 'The answer is'.",
            citation="",
            inputs_description="predictions and references: texts with a marked final answer at the end",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        answers = [final_answer(text) for text in references]
        if None in answers:
            raise ValueError(f"Reference {answers.index(None)} has no final answer after '####' or 'The answer is'.")
        right = [final_answer(text) == answer for text, answer in zip(predictions, answers, strict=True)]
        return {"exact_match": sum(right) / len(right)}
