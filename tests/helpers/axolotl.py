"""What axolotl 0.19 does with a plugin, as its source says, without axolotl. Not a test itself."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pydantic
import torch
import yaml
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments

PLUGIN = "resofilter_trainer.integrations.axolotl.ResonancePlugin"
HEAD = f"""\
plugins:
  - {PLUGIN}
num_epochs: 3
micro_batch_size: 2
gradient_accumulation_steps: 3
learning_rate: 1e-3
"""


class Settings(dict):
    """Settings of which those that are not set are None, as axolotl's."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


class BasePlugin:
    """The hooks that are called here; those of axolotl do nothing either."""

    def register(self, cfg: Any) -> None: ...

    def get_input_args(self) -> str | None: ...

    def pre_model_load(self, cfg: Any) -> None: ...

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return []


class InputConfig(pydantic.BaseModel):
    """axolotl's own settings, as far as they are used here; others are dropped."""

    plugins: list[str] | None = None
    num_epochs: float = 1.0
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    learning_rate: float = 0.0
    max_steps: int | None = None
    adapter: str | None = None
    lora_mlp_kernel: bool | None = None
    lr_scheduler: str | None = "cosine"
    cosine_min_lr_ratio: float | None = None
    sample_packing: bool | None = None
    fp16: bool | None = None
    resume_from_checkpoint: str | None = None
    output_dir: str = ""


class AxolotlTrainer(Trainer):
    """A loader of its own; and a loss that is averaged, since the model's backbone takes no number of items."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        **_: Any,
    ) -> Any:
        dataset = self._remove_unused_columns(dataset, description="training")
        loader = DataLoader(
            dataset.remove_columns(["length"]) if "length" in dataset.column_names else dataset,
            batch_size=batch_size,
            collate_fn=self.data_collator,
            sampler=sampler_fn(dataset),
            drop_last=self.args.dataloader_drop_last,
        )
        return self.accelerator.prepare(loader)


def plugin(monkeypatch: Any) -> Any:
    """A plugin, loaded as axolotl does from its name in the YAML."""
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = BasePlugin  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    module, _, kind = PLUGIN.rpartition(".")
    monkeypatch.delitem(sys.modules, module, raising=False)
    return getattr(importlib.import_module(module), kind)()


def load(text: str, plugin: Any) -> Settings:
    """The settings of a YAML: registered with the plugin, then checked and completed."""
    cfg = Settings(yaml.safe_load(HEAD + text))
    plugin.register(cfg)
    module, _, name = plugin.get_input_args().rpartition(".")
    own = getattr(sys.modules[module], name)
    settings = type("AxolotlInputConfig", (InputConfig, own), {})(**cfg)
    cfg = Settings(settings.model_dump(exclude_none=True))
    if cfg.adapter == "lora" and cfg.lora_mlp_kernel is None:
        cfg["lora_mlp_kernel"] = True
    return cfg


def pad(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded on the right to a multiple of 64, as axolotl pads."""
    longest = -(-max(len(each["input_ids"]) for each in examples) // 64) * 64
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([list(each[name]) + [value] * (longest - len(each[name])) for each in examples])
        for name, value in fill.items()
    }


def train(cfg: Settings, plugin: Any, model: PreTrainedModel, dataset: Dataset, output: Path) -> Trainer:
    """Train as axolotl does with these settings."""
    plugin.pre_model_load(cfg)
    batch = cfg.micro_batch_size * cfg.gradient_accumulation_steps
    args = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=cfg.micro_batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        num_train_epochs=cfg.num_epochs,
        learning_rate=cfg.learning_rate,
        max_steps=cfg.max_steps or -int(-len(dataset) * cfg.num_epochs // batch),
        save_strategy="steps",
        save_steps=1,
        logging_steps=1,
        seed=3,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = AxolotlTrainer(model, args, data_collator=pad, train_dataset=dataset)
    for callback in plugin.add_callbacks_post_trainer(cfg, trainer):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=cfg.resume_from_checkpoint)
    return trainer
