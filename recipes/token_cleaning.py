"""Token Cleaning (arXiv 2502.01968) from end to end: which tokens are worth learning, and a model tuned on them.

    accelerate launch recipes/token_cleaning.py --dataset_name rows.jsonl --output_dir runs/cleaned
    accelerate launch recipes/token_cleaning.py --config recipes/token_cleaning.yaml --mode fixed --warmup_rows 10000
    accelerate launch recipes/token_cleaning.py --mode fixed --reference tuned/ --dataset_name rows.jsonl

`--mode self-evolving`, the default, divides the rows into five stages (`--parts`). The base model learns all tokens of
the first stage. Each further stage is cleaned by the base against the latest model, which then learns what is kept.
Every stage has its own learning-rate schedule, and its LoRA adapter is merged at its end.

`--mode fixed` tunes a reference model on a warm-up set (the first `--warmup_rows` rows, or `--warmup_dataset_name`) or
takes the one that `--reference` names, cleans all rows once, and tunes the base model on what is kept. `--mode rho`
does the same, but ranks the tokens within each row.

The defaults are the paper's: 60 % of the tokens, LoRA of rank 64 on all projections, learning rate 1e-4, linear, one
epoch, unshuffled, 48 rows per step, 2048 tokens. All arguments of SFTConfig and ModelConfig can be passed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from resofilter_trainer.cli.recipe import parse_recipe, recipe_parser

# isort: split
from accelerate import PartialState
from datasets import Dataset
from trl import ModelConfig, SFTConfig, TrlParser, get_peft_config

from resofilter_trainer import (
    ColumnMapping,
    InputError,
    TokenCleaning,
    clean_dataset,
    load_rows,
    map_columns,
    read_contents,
    write_report,
)
from resofilter_trainer.cli.entry import exit_on_input_error
from resofilter_trainer.config import CLEANING_MODES, Ranking, cleaning_of_mode, whole_number
from resofilter_trainer.config.compatibility import settle_arguments
from resofilter_trainer.data.loading import load_model, usable_rows
from resofilter_trainer.data.row_texts import RowTexts, decoder
from resofilter_trainer.tokens.cleaned_dataset import described, groups_of
from resofilter_trainer.training.fine_tuning import check_settings, fine_tune, save_model, training_settings
from resofilter_trainer.training.self_evolving import self_evolve

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class RecipeArguments:
    """The rows to clean, and how to clean them."""

    dataset_name: str | None = field(default=None, metadata={"help": "a name on the hub, a data file, or a folder"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration on the hub"})
    prompt_column: str | None = field(default=None, metadata={"help": "the prompt's column, if it is not 'prompt'"})
    completion_column: str | None = field(default=None, metadata={"help": "the column of the answer, likewise"})
    messages_column: str | None = field(default=None, metadata={"help": "the column of messages, likewise"})
    drop_duplicates: bool = field(default=False, metadata={"help": "leave out rows whose prompt repeats another's"})
    drop_empty: bool = field(default=False, metadata={"help": "leave out rows with an empty completion"})
    mode: str = field(default="self-evolving", metadata={"help": " | ".join(CLEANING_MODES)})
    keep_tokens: float = field(default=0.6, metadata={"help": "the share of the tokens to keep"})
    ranking: Ranking | None = field(default=None, metadata={"help": "global, or sample (the only one with --mode rho)"})
    parts: int = field(default=5, metadata={"help": "the number of stages of --mode self-evolving"})
    group_by: str | None = field(default=None, metadata={"help": "a column; the share kept of each group is reported"})
    reference: str | None = field(default=None, metadata={"help": "a tuned model or adapter, instead of the warm-up"})
    warmup_dataset_name: str | None = field(default=None, metadata={"help": "rows to tune the reference on"})
    warmup_rows: int = field(default=10_000, metadata={"help": "the number of first rows that are the warm-up set"})
    tokens_per_batch: int = field(default=4096, metadata={"help": "tokens of a batch when measuring, padding included"})

    def columns(self) -> ColumnMapping:
        """The column mapping of the rows."""
        return ColumnMapping(self.prompt_column, self.completion_column, self.messages_column)

    def cleaning(self, reference: str | None) -> TokenCleaning:
        """The settings of the library."""
        return cleaning_of_mode(
            self.mode,
            reference,
            self.ranking,
            keep=self.keep_tokens,
            parts=self.parts,
            group_by=self.group_by,
            tokens_per_batch=self.tokens_per_batch,
        )


@dataclass
class PaperTraining(SFTConfig):
    """SFTConfig with the paper's defaults (Token Cleaning, released training settings)."""

    output_dir: str | None = field(default="runs/token_cleaning", metadata={"help": "the folder for all results"})
    learning_rate: float = field(default=1e-4, metadata={"help": "initial learning rate of every training"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "epochs of every training"})
    warmup_steps: float = field(default=0.03, metadata={"help": "steps of warm-up, or below 1 their share"})
    gradient_accumulation_steps: int = field(default=6, metadata={"help": "batches of one optimizer step"})
    train_sampling_strategy: str = field(default="sequential", metadata={"help": "the order of the rows in training"})
    bf16: bool | None = field(default=False, metadata={"help": "bfloat16 autocast, in measuring and training"})
    max_length: int | None = field(default=2048, metadata={"help": "tokens of a row; longer rows are truncated"})
    save_strategy: str = field(default="no", metadata={"help": "checkpoints within a training"})

    def __post_init__(self) -> None:
        settle_arguments(self)
        super().__post_init__()


@dataclass
class PaperModel(ModelConfig):
    """ModelConfig with the paper's model and LoRA; `--use_peft false` trains all weights."""

    model_name_or_path: str | None = field(default="meta-llama/Llama-3.2-3B", metadata={"help": "a name or a folder"})
    use_peft: bool = field(default=True, metadata={"help": "train LoRA adapters"})
    lora_r: int = field(default=64, metadata={"help": "rank"})
    lora_alpha: int = field(default=16, metadata={"help": "alpha"})
    lora_dropout: float = field(default=0.1, metadata={"help": "dropout"})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: list(PROJECTIONS), metadata={"help": "which modules get adapters"}
    )


def main(parser: TrlParser) -> None:
    recipe, training, model = parse(parser)
    training.model_init_kwargs = {
        "dtype": model.dtype if model.dtype not in (None, "auto") else "float32",
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        **(training.model_init_kwargs or {}),
    }
    dataset = load_rows(str(recipe.dataset_name), "train", recipe.dataset_config)
    groups_of(dataset, recipe.group_by)  # raises before anything is trained
    usable_rows(dataset, recipe.columns(), training, recipe.drop_duplicates, recipe.drop_empty)
    columns = asdict(recipe.columns()) | {"drop_duplicates": recipe.drop_duplicates, "drop_empty": recipe.drop_empty}
    if recipe.mode == "self-evolving":
        evolved = self_evolve(
            str(model.model_name_or_path),
            dataset,
            recipe.cleaning(None),
            training,
            peft_config=get_peft_config(model),
            **columns,
        )
        finish(evolved.summary, evolved.reasons, training, f"stage-{recipe.parts - 1}/model")
        return
    reference = recipe.reference or warm_up(dataset, recipe, training, model)
    cleaned = clean_dataset(
        str(model.model_name_or_path),
        dataset,
        recipe.cleaning(reference),
        args=training,
        output=Path(str(training.output_dir)) / "cleaned",
        **columns,
    )
    tune(cleaned.dataset, training, model, "model")
    finish(cleaned.summary, cleaned.reasons, training, "model")
    if PartialState().is_main_process:
        report(dataset, recipe, training, str(model.model_name_or_path))


def parse(parser: TrlParser) -> tuple[RecipeArguments, SFTConfig, ModelConfig]:
    """The command line and the YAML file, parsed by TRL."""
    recipe, training, model = parse_recipe(parser)
    recipe.cleaning(recipe.reference)
    if recipe.dataset_name is None or model.model_name_or_path is None:
        raise InputError("Pass --dataset_name and --model_name_or_path.")
    whole_number("warmup_rows", recipe.warmup_rows, least=1)
    if model.load_in_4bit or model.load_in_8bit:
        raise InputError("This recipe loads no quantised models: leave out --load_in_4bit and --load_in_8bit.")
    return recipe, training, model


def warm_up(dataset: Dataset, recipe: RecipeArguments, training: SFTConfig, model: ModelConfig) -> str:
    """Tune the base model on all tokens of the warm-up set. Returns the folder of this reference model."""
    name = recipe.warmup_dataset_name
    rows = dataset if name is None else load_rows(name, "train")
    rows = rows.select(range(min(recipe.warmup_rows, len(rows))))
    tune(map_columns(rows, recipe.columns(), training.dataset_text_field, training), training, model, "reference")
    return str(Path(str(training.output_dir)) / "reference")


def tune(rows: Dataset, training: SFTConfig, model: ModelConfig, name: str) -> None:
    """Tune the base model and write it to a folder of this name, unless it exists and has the same settings."""
    folder = Path(str(training.output_dir)) / name
    peft_config = get_peft_config(model)
    settings = {"model": model.model_name_or_path, "rows": rows._fingerprint}
    check_settings(folder.with_name(f"{name}.json"), settings | training_settings(training, peft_config))
    if folder.is_dir():
        return
    base, tokenizer = load_model(str(model.model_name_or_path), None, training)
    trained = fine_tune(base, rows, training, tokenizer, peft_config, folder.with_name(f"{name}-training"))
    save_model(trained, tokenizer, folder)


def report(dataset: Dataset, recipe: RecipeArguments, training: SFTConfig, model: str) -> None:
    """Write a report of the masked tokens beside the cleaned dataset."""
    folder = Path(str(training.output_dir)) / "cleaned"
    texts = RowTexts(dataset, recipe.columns(), training.dataset_text_field)
    written = write_report(read_contents(folder), folder, texts, groups_of(dataset, recipe.group_by), decoder(model))
    print(f"Report of the masked tokens: {written.path}")


def finish(summary: Mapping[str, Any], reasons: Mapping[int, str], training: SFTConfig, model: str) -> None:
    """Print what was kept, and where the results are."""
    if PartialState().is_main_process:
        output = Path(str(training.output_dir))
        print(described(summary, reasons))
        print(f"The model: {output / model}. Everything else: {output}")


if __name__ == "__main__":
    arguments = recipe_parser(RecipeArguments, PaperTraining, PaperModel)
    with exit_on_input_error("token_cleaning.py", arguments):
        main(arguments)
