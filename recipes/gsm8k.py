"""Score, select, train, evaluate on GSM8K: ResoFilter in two passes.

    accelerate launch recipes/gsm8k.py
    accelerate launch recipes/gsm8k.py --config recipes/gsm8k.yaml --keep 0.25
    accelerate launch recipes/gsm8k.py --model_name_or_path MODEL --dataset_name folder/ --use_peft --lora_r 16

The defaults are the paper's (ResoFilter, arXiv 2412.14809): Gemma-2-2B base, learning rate 1e-5, one epoch, effective
batch 16, 768 tokens, the last three layers, half of the rows. For its MetaMathQA:

    accelerate launch recipes/gsm8k.py --dataset_name meta-math/MetaMathQA --dataset_config default \
        --prompt_column query --completion_column response --test_dataset_name openai/gsm8k

Pass one scores every training row with the untrained model; pass two trains on the rows to keep. Both take SFTConfig's
arguments. The default is the paper's float32. With `--bf16 true` both passes run in bfloat16 autocast, which is several
times faster on a GPU; the line on trust says how well the ranking agrees with float32.

For invalid input `python recipes/gsm8k.py` exits with code 2; `accelerate launch` turns every code but 0 into 1.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from resofilter_trainer.cli.recipe import parse_recipe, recipe_parser

# isort: split
from accelerate import PartialState
from datasets import Dataset
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from resofilter_trainer import (
    ColumnMapping,
    DataSelector,
    InputError,
    ResonanceConfig,
    ScoreTable,
    Selection,
    Warmup,
    load_rows,
    map_columns,
    score_dataset,
    write_report,
)
from resofilter_trainer.cli.entry import exit_on_input_error
from resofilter_trainer.cli.naming import told
from resofilter_trainer.config import Norm, ScoreWarning
from resofilter_trainer.config.compatibility import need_extra, settle_arguments
from resofilter_trainer.data.files import only_split
from resofilter_trainer.data.row_texts import RowTexts
from resofilter_trainer.evaluation.generate import exact_match
from resofilter_trainer.evaluation.metrics.final_answer import final_answer
from resofilter_trainer.model.signals import chosen_signals
from resofilter_trainer.report import Contents
from resofilter_trainer.scores.score_table import LAYER
from resofilter_trainer.scoring.further_signals import ALL_SIGNALS

COLUMNS = ("score", "loss", "num_tokens", "length")  # of every table of scores
# The options of the measured step: those without `score_` are the training's.
SCORE_OPTIONS = {"lr": "score_lr", "eps": "score_eps", "weight_decay": "score_weight_decay"}


@dataclass
class RecipeArguments:
    """The rows to train and test on, and how to filter them."""

    dataset_name: str = field(
        default="openai/gsm8k", metadata={"help": "a name on the hub, a data file, or a folder with train and test"}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration on the hub; GSM8K's is 'main'"})
    test_dataset_name: str | None = field(
        default=None,
        metadata={"help": "the dataset of the test split, if another; its columns are question and answer"},
    )
    prompt_column: str = field(default="question", metadata={"help": "column of the training rows"})
    completion_column: str = field(default="answer", metadata={"help": "column of the training rows"})
    keep: float = field(
        default=0.5, metadata={"help": "the share of the rows to keep; those with the largest changes are dropped"}
    )
    by: list[str] = field(
        default_factory=lambda: ["score"], metadata={"help": "the columns to rank by, as in resofilter select"}
    )
    drop: str | None = field(default=None, metadata={"help": "the end to drop; by default the signal's own"})
    combine: str = field(default="ranks", metadata={"help": "how several columns become one"})
    signals: list[str] = field(default_factory=list, metadata={"help": "further signals to measure"})
    reference: str | None = field(default=None, metadata={"help": "the second model of excess and superfiltering"})
    warmup: int | None = field(default=None, metadata={"help": "tune a copy on so many rows first, which then scores"})
    warmup_method: str = field(default="full", metadata={"help": "full: all weights; or lora"})
    warmup_lr: float | None = field(default=None, metadata={"help": "the warm-up's first learning rate"})
    warmup_epochs: int = field(default=1, metadata={"help": "how often the warm-up learns each row"})
    warmup_batch_size: int = field(default=8, metadata={"help": "the rows of a step of the warm-up"})
    warmup_seed: int = field(default=0, metadata={"help": "draws the warm-up's rows"})
    n_layers: int = field(default=3, metadata={"help": "the number of last layers that are measured"})
    update: Literal["adamw", "sgd"] = field(default="adamw", metadata={"help": "the optimizer step that is measured"})
    norm: Norm = field(default="mean_abs", metadata={"help": "the norm that turns a matrix of changes into one number"})
    score_lr: float = field(default=1e-5, metadata={"help": "learning rate of the measured step"})
    score_eps: float = field(default=1e-8, metadata={"help": "AdamW's eps in the measured step"})
    score_weight_decay: float = field(default=0.01, metadata={"help": "weight decay of the measured step"})
    up_projection: str | None = field(default=None, metadata={"help": "a regex, for model families that are not known"})
    max_new_tokens: int = field(default=256, metadata={"help": "the most tokens of a generated answer"})

    def columns(self) -> ColumnMapping:
        """The column mapping of the training rows."""
        return ColumnMapping(prompt_column=self.prompt_column, completion_column=self.completion_column)

    def __post_init__(self) -> None:
        for name in ("by", "signals"):  # a settings file may have one as text
            value = getattr(self, name)
            setattr(self, name, value.split(",") if isinstance(value, str) else value)

    def selector(self) -> DataSelector:
        """The policy that drops rows."""
        by = self.by[0] if len(self.by) == 1 else self.by
        return DataSelector(keep=self.keep, by=by, drop=self.drop, combine=self.combine)  # type: ignore[arg-type]

    def measured(self) -> tuple[str, ...]:
        """The signals to measure: those asked for, and those to rank by."""
        ranked = [name.removeprefix("-") for name in self.by]
        others = [name for name in ranked if name not in COLUMNS and not name.startswith(LAYER)]
        return chosen_signals([*self.signals, *others], ALL_SIGNALS)

    def warming(self) -> Warmup | None:
        """The warm-up before the scoring pass, if any."""
        if self.warmup is None:
            return None
        method: Any = self.warmup_method
        own = {name: getattr(self, f"warmup_{name}") for name in ("lr", "epochs", "batch_size", "seed")}
        return Warmup(rows=self.warmup, method=method, **own)

    def resonance(self) -> ResonanceConfig:
        """The settings of the scoring pass."""
        return ResonanceConfig(
            n_layers=self.n_layers,
            update=self.update,
            norm=self.norm,
            lr=self.score_lr,
            eps=self.score_eps,
            weight_decay=self.score_weight_decay,
            up_projection=self.up_projection,
        )


@dataclass
class PaperTraining(SFTConfig):
    """SFTConfig with the paper's defaults (ResoFilter, released training settings)."""

    output_dir: str | None = field(default="runs/gsm8k", metadata={"help": "the folder for all results"})
    learning_rate: float = field(default=1e-5, metadata={"help": "initial learning rate of the training"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "epochs over the kept rows"})
    weight_decay: float = field(default=0.1, metadata={"help": "weight decay of the training"})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's beta2 in the training"})
    warmup_steps: float = field(default=0.01, metadata={"help": "steps of warm-up, or below 1 their share"})
    bf16: bool | None = field(default=False, metadata={"help": "bfloat16 autocast, in scoring and training"})
    gradient_accumulation_steps: int = field(default=2, metadata={"help": "batches of one optimizer step"})
    max_length: int | None = field(default=768, metadata={"help": "tokens of a row; longer rows are truncated"})

    def __post_init__(self) -> None:
        settle_arguments(self)
        super().__post_init__()


@dataclass
class PaperModel(ModelConfig):
    """ModelConfig with the paper's model."""

    model_name_or_path: str | None = field(default="google/gemma-2-2b", metadata={"help": "a name or a folder"})


def main(parser: TrlParser) -> None:
    recipe, training, model = parse(parser)
    training.model_init_kwargs = {
        "dtype": model.dtype,
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        **(training.model_init_kwargs or {}),
    }
    selector = recipe.selector()
    recipe.measured()  # refuses unknown ones before any work
    train = load_rows(recipe.dataset_name, "train", configuration(recipe.dataset_name, recipe))
    test = test_rows(recipe)

    scores = score_rows(train, recipe, training, model)
    selection = selector.select(scores)
    if PartialState().is_main_process:
        selection.save(str(training.output_dir))
    trainer = train_on(map_columns(selection.apply(train), recipe.columns()), training, model)
    accuracy = exact_match(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        test["prompt"],
        test["completion"],
        max_new_tokens=recipe.max_new_tokens,
        batch_size=training.per_device_eval_batch_size,
    )
    if PartialState().is_main_process:
        write_results(scores, selection, accuracy, len(test), recipe, training)
        contents, texts = Contents(scores, selection), RowTexts(train, recipe.columns())
        report = write_report(contents, str(training.output_dir), texts)
        print(f"Report of the dropped rows: {report.path}")
    trainer.accelerator.end_training()


def parse(parser: TrlParser) -> tuple[RecipeArguments, SFTConfig, ModelConfig]:
    """The command line and the YAML file, parsed by TRL."""
    recipe, training, model = parse_recipe(parser)
    need_extra("compare", "The recipe")  # for the evaluation at its end
    if model.load_in_4bit or model.load_in_8bit:
        raise InputError("This recipe loads no quantised models: leave out --load_in_4bit and --load_in_8bit.")
    return recipe, training, model


def test_rows(recipe: RecipeArguments) -> Dataset:
    """The test split as prompt and completion."""
    name = recipe.test_dataset_name or recipe.dataset_name
    mapping = ColumnMapping(prompt_column="question", completion_column="answer")
    rows = map_columns(load_rows(name, only_split(name) or "test", configuration(name, recipe)), mapping)
    unmarked = [row for row, text in enumerate(rows["completion"]) if final_answer(text) is None]
    if unmarked:
        raise InputError(f"Row {unmarked[0]} of the test split has no final answer after '####' to compare with.")
    return rows


def configuration(name: str, recipe: RecipeArguments) -> str | None:
    """The configuration to load. GSM8K on the hub has no default configuration."""
    if recipe.dataset_config and name == recipe.dataset_name:
        return recipe.dataset_config
    return "main" if name == "openai/gsm8k" else None


def score_rows(train: Dataset, recipe: RecipeArguments, training: SFTConfig, model: ModelConfig) -> ScoreTable:
    """Pass one: every row's resonance under the untrained model. Repeated prompts are left out, as in the paper."""
    if model.model_name_or_path is None:
        raise InputError("Pass --model_name_or_path.")
    source = {"dataset": recipe.dataset_name, "split": "train", "name": configuration(recipe.dataset_name, recipe)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScoreWarning)  # the summary has them
        scores = score_dataset(
            model.model_name_or_path,
            train,
            args=training,
            config=recipe.resonance(),
            signals=recipe.measured(),
            reference=recipe.reference,
            warmup=recipe.warming(),
            output=Path(str(training.output_dir)) / "scores",
            drop_duplicates=True,
            prompt_column=recipe.prompt_column,
            completion_column=recipe.completion_column,
            source=source,
        )
    if PartialState().is_main_process:
        print(told(scores.summary()))
    return scores


def train_on(rows: Dataset, training: SFTConfig, model: ModelConfig) -> SFTTrainer:
    """Pass two: SFTTrainer on the kept rows."""
    trainer = SFTTrainer(
        model=model.model_name_or_path, args=training, train_dataset=rows, peft_config=get_peft_config(model)
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    return trainer


def write_results(
    scores: ScoreTable,
    selection: Selection,
    accuracy: float,
    test_rows: int,
    recipe: RecipeArguments,
    training: SFTConfig,
) -> None:
    """Write `results.json` beside the scores, the selection and the model, and print the accuracy."""
    output = Path(str(training.output_dir))
    trust = scores.provenance.trust
    results = {
        "rows": len(selection),
        "kept": int(selection.keep.sum()),
        "test_rows": test_rows,
        "exact_match": accuracy,
        "trust": None if trust is None else asdict(trust),
        "recipe": asdict(recipe),
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(
        f"Trained on {results['kept']} of {results['rows']} rows: exact match {accuracy:.4f} on {test_rows} test rows."
    )
    print(f"Scores, selection, model and results.json: {output}")


if __name__ == "__main__":
    arguments = recipe_parser(RecipeArguments, PaperTraining, PaperModel)
    with exit_on_input_error("gsm8k.py", arguments, SCORE_OPTIONS):
        main(arguments)
