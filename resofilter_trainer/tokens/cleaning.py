"""Token cleaning: which tokens of a dataset are worth learning, by a rule and what a model or two say of them.

    losses, statistics -> TokenScores  ==saved==>  TokenRule -> labels with -100, or a weight for each

Knows models and rows as tokens. `scoring.token_losses` measures, `selecting.token_rules` decides.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..config import SELF, ColumnMapping, InputError, TokenCleaning, check_kind
from ..config.keywords import RowOptions
from ..data.arguments import check_call
from ..data.loading import Opened, check_arguments, check_model, default_arguments, open_pass, placed, usable_rows
from ..data.message_weights import weights_apart, weights_of_tokens
from ..data.preparation import PreparedRows
from ..data.reference_model import Reference
from ..io.digest import hash_rows
from ..model.losses import vocabulary_of
from ..scores.provenance import Provenance
from ..scores.token_scores import MEASURED, TOKEN_SCORES_FILE, TokenScores
from ..scoring.passes import locked
from ..selecting.named_rules import rho, rule_of, token_cleaning
from ..selecting.token_rules import MESSAGE_WEIGHT, OF_OTHERS, TokenInputs, TokenRule
from ..selecting.token_selection import EMPTIED, TokenSelection, TokenSelector
from ..selecting.weighted_rows import TOKEN_WEIGHTS
from .cleaned_dataset import CleanedDataset, check_output, groups_of, mask_labels, save_dataset, summarise
from .losses import against, losses_under, remove_loss_parts, score_tokens, statistics_under

RANKINGS = {"token_cleaning": "global", "rho": "sample"}
REFERENCE_NAMES = ("reference_weights", "reference_settings")  # in the provenance's config
NO_REFERENCE = "pass reference=, a model or a LoRA adapter"


def clean_dataset(
    model: str | PreTrainedModel,
    dataset: Dataset,
    cleaning: TokenCleaning | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    args: SFTConfig | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    rule: str | TokenRule | Callable[[TokenInputs], Any] | None = None,
    keep: float | None = None,
    reference: str | None = None,
    group_by: str | None = None,
    tokens_per_batch: int | None = None,
    **row_options: Unpack[RowOptions],
) -> CleanedDataset:
    """Mask or weigh the tokens of a dataset by a rule, before training on them.

    >>> clean_dataset(model, rows, rule="profit")  # one forward of the model
    >>> clean_dataset(model, rows, rule="token_cleaning", keep=0.6, reference="tuned/")  # one of each model
    >>> clean_dataset(model, rows, TokenCleaning(reference="tuned/"))  # the same

    Args:
        model: the base model, or its name or folder, which is then loaded in float32.
        dataset: rows as for `score_dataset`. Labels that are masked already stay masked and are no candidates.
        cleaning: the reference model, the share of tokens to keep and their ranking, for Token Cleaning (arXiv
            2502.01968, section 3) and RHO. In the place of all arguments from `rule` to `tokens_per_batch`. Two models
            are in memory at once only where `model` is a loaded model and the reference is no adapter.
        processing_class: the tokenizer of both models; by default the base model's own.
        args: SFTTrainer's arguments: lengths, masking, device, and `bf16` for a forward in bfloat16 autocast. By
            default SFTConfig's own, without bf16.
        output: a folder for the cleaned dataset (`datasets.load_from_disk`), the token scores and a summary. Existing
            scores of the same models and rows are reused; an interrupted pass is resumed.
        rule: the name of a rule (see `token_rule` and `docs/token_rules.md`), a `TokenRule`, or a function from
            `TokenInputs` to weights. A mask gives labels of -100; weights give the column `token_weights`, a list for
            each row.
        keep: the share of the tokens to keep, for a rule's name; by default the rule's own, or its paper's bound.
        reference: the model or LoRA adapter whose losses the rule compares with; for `"sstoken"`, earlier weights of
            `model`.
        group_by, tokens_per_batch: as in `TokenCleaning`.
        **row_options: `drop_duplicates`, `drop_empty`, `source` and the columns, as for `score_dataset`.

    As in SFTTrainer, random numbers start from `args.seed`.

    Raises:
        InputError: no token can be learnt, the rule needs what is not there or returns no weights, the reference is
            missing or has another vocabulary, a loss is not finite, `output` holds something else, or another run
            writes to it.
    """
    check_call(clean_dataset, row_options, model, processing_class, args)
    given = {"keep": keep, "reference": reference, "group_by": group_by, "tokens_per_batch": tokens_per_batch}
    settings, chosen = _settings(cleaning, rule, given, (args or default_arguments()).seed)
    folder = _folder(output)
    check_output(folder, TOKEN_SCORES_FILE)
    with locked(folder):
        task, scores = _scored(model, dataset, settings, chosen, processing_class, args, folder, **row_options)
        return _cleaned(task, scores)


def measure_tokens(
    model: str | PreTrainedModel,
    dataset: Dataset,
    cleaning: TokenCleaning,
    processing_class: PreTrainedTokenizerBase | None = None,
    args: SFTConfig | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    rule: TokenRule | None = None,
    **row_options: Any,
) -> tuple[CleaningTask, TokenScores]:
    """The losses of every learnt token under the base and the reference model. Arguments and errors: `clean_dataset`'s.

    With a rule, it is what that rule needs.

    Returns:
        The task with its rows as tokens, and the token scores, which are also in `output`.
    """
    folder = _folder(output)
    with locked(folder):
        chosen = rule or _rule_of(cleaning)
        return _scored(model, dataset, cleaning, chosen, processing_class, args, folder, **row_options)


@dataclass(frozen=True)
class CleaningTask:
    """Everything about one cleaning except its models.

    Attributes:
        cleaning: the settings.
        args: SFTTrainer's arguments.
        opened: the tokenizer, the rows as tokens, and the provenance of the base model's losses.
        groups: the group of each of the user's rows, or None.
        folder: the output folder, or None.
        rule: the rule that decides on tokens.
        vocabulary: the number of the base model's logits.
        given: (N,) each by its name in `TokenScores`, what the user's rows say of their tokens.
    """

    cleaning: TokenCleaning
    args: SFTConfig
    opened: Opened
    groups: list[Any] | None
    folder: Path | None
    rule: TokenRule
    vocabulary: int
    given: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def selector(self) -> TokenSelector:
        """Decides which tokens are kept."""
        return TokenSelector(self.cleaning.keep, self.cleaning.ranking)

    def losses(self, model: PreTrainedModel, name: str, rows: PreparedRows, provenance: Provenance) -> np.ndarray:
        """A model's loss of every learnt token, (N,) float32; see `losses_under`."""
        budget = self.cleaning.tokens_per_batch
        return losses_under(model, name, rows, self.args, budget, self.folder, provenance.compared)

    def measured(self, base: PreTrainedModel, existing: TokenScores | None) -> dict[str, np.ndarray]:
        """What the rule needs of the base model, (N,) each by its name in `TokenScores`, and what exists already.

        Args:
            base: the base model.
            existing: existing token scores of the same model and rows.
        """
        rows, provenance = self.opened.prepared, self.opened.provenance
        found = {} if existing is None else {name: getattr(existing, name) for name in existing.columns}
        found = {name: found[name] for name in ("base", *MEASURED) if name in found}
        missing = [name for name in MEASURED if name in self.rule.needs and name not in found]
        if missing:
            budget = self.cleaning.tokens_per_batch
            more = statistics_under(base, "base", rows, self.args, budget, missing, self.folder, provenance.compared)
            return {"base": more["loss"], **{name: more[name] for name in missing}, **found}
        return found or {"base": self.losses(base, "base", rows, provenance)}

    def existing_scores(self) -> TokenScores | None:
        """The token scores that are in the folder already, of the same base model and rows and whatever reference."""
        if self.folder is None or not (self.folder / TOKEN_SCORES_FILE).exists():
            return None
        existing = TokenScores.load(self.folder)
        of_reference = {name: value for name, value in existing.provenance.config.items() if name in REFERENCE_NAMES}
        here = self.opened.provenance_like(existing.provenance.dataset)
        here = dataclasses.replace(here, config={**here.config, **of_reference})
        existing.provenance.check_same(here, "token scores", self.folder)
        return existing

    def groups_of(self, sample_id: np.ndarray) -> list[Any] | None:
        """The groups of some rows, by their positions in the user's dataset."""
        return None if self.groups is None else [self.groups[row] for row in sample_id]


def open_task(
    model: str | PreTrainedModel,
    dataset: Dataset,
    cleaning: TokenCleaning,
    processing_class: PreTrainedTokenizerBase | None,
    args: SFTConfig,
    folder: Path | None,
    *,
    rule: TokenRule | None = None,
    source: Mapping[str, Any] | None = None,
    **row_options: Any,
) -> tuple[PreTrainedModel, CleaningTask]:
    """The base model, on its device, and the task. Arguments and errors: `clean_dataset`'s."""
    check_arguments(args, folder)
    if TOKEN_WEIGHTS in (getattr(dataset, "column_names", None) or []):
        raise InputError(
            f"The rows have weights of their tokens ('{TOKEN_WEIGHTS}'), which cleaning would lose. Train on them with "
            "TokenWeights, or remove the column."
        )
    groups = groups_of(dataset, cleaning.group_by)
    config = {"tokens_per_batch": cleaning.tokens_per_batch}
    rule = rule or _rule_of(cleaning)
    if {*OF_OTHERS} & {*rule.needs}:
        source = {**(source or {}), "reference": cleaning.reference}
    given = {}
    own = dataset
    if MESSAGE_WEIGHT in rule.needs:
        dataset = weights_apart(dataset)
    base, opened = open_pass(model, dataset, processing_class, args, config, source=source, **row_options)
    if MESSAGE_WEIGHT in rule.needs:
        given[MESSAGE_WEIGHT] = weights_of_tokens(_read_again(dataset, args, **row_options), opened.prepared, args)
        of_own = {**opened.provenance.source, "content": hash_rows(own)}  # the user's rows, not the renamed ones
        opened = dataclasses.replace(opened, provenance=dataclasses.replace(opened.provenance, source=of_own))
    return placed(base, args), CleaningTask(cleaning, args, opened, groups, folder, rule, vocabulary_of(base), given)


def _read_again(
    dataset: Dataset, args: SFTConfig, drop_duplicates: bool = False, drop_empty: bool = False, **columns: Any
) -> Dataset:
    """The usable rows of a pass under TRL's column names, before they become tokens."""
    return usable_rows(dataset, ColumnMapping(**columns), args, drop_duplicates, drop_empty)[0]


def _settings(
    cleaning: TokenCleaning | None, rule: Any, given: Mapping[str, Any], seed: int
) -> tuple[TokenCleaning, TokenRule]:
    """The settings of a cleaning and its rule, from `cleaning` or from `rule` and what goes with it.

    Raises:
        InputError: both or neither are given, or the rule needs what is not there.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if (cleaning is None) == (rule is None):
        raise InputError("Pass a rule, such as rule='profit', or cleaning=TokenCleaning(reference=...).")
    if rule is None:
        check_kind("cleaning", cleaning, TokenCleaning, "a TokenCleaning")
        if given:
            name = next(iter(given))
            raise InputError(f"{name}= goes with rule=: without a rule, it is a setting of TokenCleaning.")
        assert cleaning is not None, "its kind was checked"
        return cleaning, _rule_of(cleaning)
    chosen = rule_of(rule, given.pop("keep", None), seed)
    others = [need for need in chosen.needs if need in OF_OTHERS]
    if "reference" not in given:
        chosen.check_needs(dict.fromkeys(OF_OTHERS, NO_REFERENCE))
    if len(others) > 1:
        raise InputError(f"The token rule '{chosen.name}' needs the losses of two other models, and one is measured.")
    if "reference" in given and not others:
        raise InputError(f"The token rule '{chosen.name}' needs no reference model: leave reference= out.")
    return TokenCleaning(**given), chosen


def _rule_of(cleaning: TokenCleaning) -> TokenRule:
    """The rule of the settings of token cleaning."""
    return (token_cleaning if cleaning.ranking == "global" else rho)(cleaning.keep)


def _scored(
    model: str | PreTrainedModel,
    dataset: Dataset,
    cleaning: TokenCleaning,
    rule: TokenRule,
    processing_class: PreTrainedTokenizerBase | None,
    args: SFTConfig | None,
    folder: Path | None,
    **row_options: Any,
) -> tuple[CleaningTask, TokenScores]:
    """Measure what the rule needs, one model after the other, and save it. The caller locks the folder."""
    of_other = bool({*OF_OTHERS} & {*rule.needs})
    if of_other and cleaning.reference == SELF:
        raise InputError(
            "reference='self' cleans while a model trains: use self_evolve or ResonanceCallback, or pass a reference."
        )
    args = args or default_arguments()
    reference = Reference.find(cleaning.reference, args) if of_other else None
    base: PreTrainedModel | None
    base, task = open_task(model, dataset, cleaning, processing_class, args, folder, rule=rule, **row_options)
    if reference is not None:
        reference.check_vocabulary(base, task.opened.tokenizer)
    rule.check(task.opened.prepared.num_tokens)
    existing = task.existing_scores()
    found = {**task.measured(base, existing), **task.given}
    if reference is None:
        other = None if existing is None else existing.reference
        provenance = task.opened.provenance if existing is None else existing.provenance
    else:
        base = base if reference.is_adapter else None  # frees a model that was loaded here before the reference is
        other, provenance = _other_losses(task, reference, base, existing)
    if existing is not None and {*found} <= {*existing.columns} and (other is None) == (existing.reference is None):
        found_again = all(np.array_equal(getattr(existing, name), values) for name, values in task.given.items())
        if found_again:  # the weights of messages are in no token
            return task, existing
    base_losses = found.pop("base")
    scores = score_tokens(task.opened.prepared, base_losses, other, provenance, found)
    if folder is not None and PartialState().is_main_process:
        scores.save(folder)
        remove_loss_parts(folder)
    return task, scores


def _other_losses(
    task: CleaningTask, reference: Reference, base: PreTrainedModel | None, existing: TokenScores | None
) -> tuple[np.ndarray, Provenance]:
    """The losses under the reference model, measured unless they exist, and the provenance of the token scores."""
    rows = task.opened.prepared
    with reference.loaded(base) as other:
        check_model(other, rows)
        provenance = against(task.opened.provenance, other)
        if existing is not None and existing.reference is not None:
            here = against(task.opened.provenance_like(existing.provenance.dataset), other)
            existing.provenance.check_same(here, "token scores", task.folder)
            return existing.reference, existing.provenance
        return task.losses(other, "reference", rows, provenance), provenance


def _cleaned(task: CleaningTask, scores: TokenScores) -> CleanedDataset:
    """Decide which tokens are kept, and mask or weigh them; saved to the task's folder."""
    rule, prepared = task.rule, task.opened.prepared
    selection = TokenSelection.of_weights(scores, rule.weights(TokenInputs.of(scores, task.vocabulary)))
    reasons = task.opened.reasons | {int(row): EMPTIED for row in scores.sample_id[selection.emptied]}
    settings = dict(rule.settings or {})
    summary = {
        "rule": rule.name,
        **({"reference": task.cleaning.reference} if {*OF_OTHERS} & {*rule.needs} else {}),
        **({"keep_tokens": settings["keep"]} if "keep" in settings else {}),
        **({"ranking": RANKINGS[rule.name]} if rule.name in RANKINGS and settings else {}),
        "settings": None if rule.settings is None else settings,
        "vocabulary": task.vocabulary,
        **summarise(selection, task.opened.tokenizer, task.groups_of(scores.sample_id)),
    }
    cleaned = CleanedDataset(mask_labels(prepared.dataset, selection), selection, reasons, summary)
    if task.folder is not None and PartialState().is_main_process:
        save_dataset(cleaned.dataset, {**summary, "rows_left_out": len(reasons)}, task.folder)
    return cleaned


def _folder(output: str | os.PathLike[str] | None) -> Path | None:
    return None if output is None else Path(output)
