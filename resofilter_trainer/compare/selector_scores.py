"""The scores of a comparison's selectors, for one model and seed. Knows which model scores, and where scores are kept.

Does not know how a method scores (`method_scores`), nor what is decided from the scores (`choosing`).
"""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from ..config import InputError
from ..data.loading import load_model
from ..scores.score_table import ScoreTable
from ..scores.token_scores import TokenScores
from .config import DEMO, ComparisonConfig, SelectorConfig, slug
from .cost import COST, parameters_of, seconds_of, timed
from .data import Data, hash_files
from .method_scores import Request, tune_reference
from .methods import Method, method_of
from .training import epochs_of, lora_config, model_path, sft_config


@dataclass(frozen=True)
class Scored:
    """The scores of a selector, and what they cost.

    Attributes:
        table: the scores.
        seconds: the time of the pass on this machine, when it was made.
        parameters: the parameters of the scoring model (`cost.parameters_of`).
        flops: the FLOPs of the pass besides forwards, with those of a warm-up.
    """

    table: ScoreTable | TokenScores
    seconds: float
    parameters: int
    flops: float


class SelectorScores:
    """The scores of every selector for one model and seed; a pass is made when its scores are first needed.

    Args:
        config: the comparison.
        model: the model that is trained.
        seed: the seed of the training.
        data: the data of that seed.
    """

    def __init__(self, config: ComparisonConfig, model: str, seed: int, data: Data) -> None:
        self.config, self.model, self.seed, self.data = config, model, seed, data
        self._folder = Path(config.output) / "scores"
        self._scored: dict[Path, Scored] = {}

    def of(self, selector: SelectorConfig) -> Scored:
        """The scores of a selector."""
        return self._scored_by(selector, self.scorer(selector))

    @cached_property
    def of_trained_model(self) -> ScoreTable:
        """Each row's tokens and loss under the trained model, before any training."""
        return cast(ScoreTable, self._scored_by(SelectorConfig("low_loss"), self.model).table)

    def check_epochs(self) -> None:
        """Raise InputError for a selector whose scores need a longer training, before anything is trained."""
        for selector in self.config.selectors:
            least = method_of(selector).epochs
            epochs = epochs_of(sft_config(self.config, self.scorer(selector), self.seed), len(self.data.rows))
            if epochs < least:
                epoch, another = ("epochs", ", or rank by mean_loss") if least > 1 else ("epoch", "")
                raise InputError(
                    f"The selector '{selector.name}' needs the losses of every row in {least} {epoch}, and the "
                    f"training has {epochs:g}: set num_train_epochs in training to {least} or more{another}."
                )

    def scorer(self, selector: SelectorConfig) -> str:
        """The name of the model that scores for a selector."""
        method = method_of(selector)
        if method.model == "proxy":
            return str(self.config.proxy_model)
        if method.model == "trained" or method.cost(self.config, selector, 1) == 0:
            return self.model
        return selector.score_model or self.config.score_model or self.model

    def origin(self, selector: SelectorConfig) -> dict[str, Any]:
        """What a cell depends on besides the settings of the comparison, by readable names."""
        method, scorer = method_of(selector), self.scorer(selector)
        reference = self._given_reference(method)
        found: dict[str, Any] = {"weights": hash_weights(model_path(self.model)), "scored by": scorer}
        if scorer != self.model:
            found["scorer's weights"] = hash_weights(model_path(scorer))
        if reference is not None:
            found |= {"reference": reference, "its weights": hash_weights(model_path(reference))}
        return {**found, "data": self.data.fingerprint(selector.column, method.validated)}

    def _scored_by(self, selector: SelectorConfig, scorer: str) -> Scored:
        folder = self._folder / slug(scorer) / self._name(selector)
        if folder not in self._scored:
            self._scored[folder] = self._measure(selector, scorer, folder)
        return self._scored[folder]

    def _name(self, selector: SelectorConfig) -> str:
        """The name of the folder of a selector's scores; selectors with the same scores share it."""
        method = method_of(selector)
        words = [f"column-{selector.score_column}" if selector.score_column else method.scores]
        words += [selector.name] if selector.settings and method.variant is None else []
        trains = method.trains and self._given_reference(method) is None
        words += [f"seed-{self.seed}"] if self.config.dataset == DEMO or trains else []
        return "-".join(words)

    def _measure(self, selector: SelectorConfig, scorer: str, folder: Path) -> Scored:
        method, data = method_of(selector), self.data
        args = sft_config(self.config, scorer, self.seed)  # the scoring model's, whichever model is trained
        reference, tuning = self._reference(method) if method.by_reference else (None, 0.0)
        model, tokenizer = load_model(model_path(scorer), None, args)
        parameters = parameters_of(model)
        own = model_path(scorer)
        adapter = lora_config(self.config)
        request = Request(model, tokenizer, data.rows, args, folder, selector, data.validation, reference, own, adapter)
        flops = method.flops(model, len(data.rows), selector)
        table, seconds = timed(folder, lambda: method.score(request), resumes=True)
        flops += 6 * parameters * table.provenance.warmup.get("tokens", 0)
        gc.collect()  # LESS trains a model, which refers to its trainer
        return Scored(table, tuning + seconds, parameters, flops)

    def _given_reference(self, method: Method) -> str | None:
        """The reference model that the settings name for a method; None where there is none."""
        return self.config.reference_model if method.by_reference and not method.tunes else None

    def _reference(self, method: Method) -> tuple[str, float]:
        """The reference model that token scores are made with, and the seconds of tuning it; 0 if it was given."""
        if (given := self._given_reference(method)) is not None:
            return model_path(given), 0.0
        folder = self._folder / slug(self.model) / f"reference-seed-{self.seed}"

        def tune() -> None:
            args = sft_config(self.config, self.model, self.seed)
            model, tokenizer = load_model(model_path(self.model), None, args)
            selector = SelectorConfig("token_fixed")
            adapter = lora_config(self.config)
            tune_reference(Request(model, tokenizer, self.data.rows, args, folder, selector, adapter=adapter), folder)

        if not (folder / COST).exists():
            timed(folder, tune, resumes=False)
        return str(folder / "model"), seconds_of(folder)


@functools.cache
def hash_weights(path: str) -> str:
    """A hash of the weight files in a folder; "" for a model on the hub, which is known by its name."""
    files = [each for each in Path(path).glob("*") if each.suffix in (".safetensors", ".bin")]
    return hash_files(Path(path), files) if files else ""
