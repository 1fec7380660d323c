"""The same scores with other libraries: once as documented, and once as fast as we can make each of them.

As documented: what the library's documentation says for per-sample gradients of three modules, with every logit, and
with batches of four samples in their given order. Tuned: everything that can be frozen is, the head runs at learnt
positions only, the backward stops at the lowest of the three modules and computes no weight's gradient twice, batches
have similar lengths, and the formula runs sample by sample, in place, in tiles that fit the cache.

Each library is imported when it is used. All methods return our scores; only time and memory differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scoring_samples import BATCH_SIZE, Method, Sample, as_rows, collate, in_batches, sorted_batches
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from resofilter_trainer import ResonanceConfig
from resofilter_trainer.model.gradients import TILE_ENTRIES
from resofilter_trainer.model.losses import IGNORE
from resofilter_trainer.model.updates import tile_sum


def opacus(model: LlamaForCausalLM, samples: Sequence[Sample], config: ResonanceConfig) -> Tensor:
    """`GradSampleModule`, with all other layers frozen, as in Opacus's tutorial on text."""
    from opacus import GradSampleModule

    weights = train_only(model, up_projections(model).values())
    wrapped, scores = GradSampleModule(model.train()), []
    for rows in in_batches(range(len(samples))):
        wrapped.zero_grad(set_to_none=True)
        sample_losses(wrapped, collate([samples[row] for row in rows])).mean().backward()
        scores.append(plain_scores([sample_gradients(weight) for weight in weights], weights, config))
    wrapped.zero_grad(set_to_none=True)
    wrapped.to_standard_module().eval()
    return torch.cat(scores)


def opacus_tuned(model: LlamaForCausalLM, samples: Sequence[Sample], config: ResonanceConfig) -> Tensor:
    """Autograd is asked for the gradient of the lowest module's output, so that it computes none of a weight."""
    from opacus import GradSampleModule

    modules = list(up_projections(model).values())
    weights = train_only(model, modules)
    lowest = Output(modules[0])
    wrapped, scores = GradSampleModule(model.train(), loss_reduction="sum"), new_scores(samples)
    for rows, batch in sorted_batches(samples):
        torch.autograd.grad(labelled_loss(model, batch), lowest.take())
        for weight in weights:
            scores[rows] += changes(sample_gradients(weight), weight, config)
        wrapped.set_grad_sample_to_none()
    wrapped.to_standard_module().eval()
    lowest.remove()
    return scores / len(modules)


def sample_gradients(weight: Any) -> Tensor:
    """The gradients that Opacus stores at a weight, (B, O, I)."""
    return weight.grad_sample


def kronfluence(model: LlamaForCausalLM, samples: Sequence[Sample], config: ResonanceConfig) -> Tensor:
    """Self-influence without a preconditioner; the task's `post_process_per_sample_gradient` gets every gradient."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.utils.dataset import DataLoaderKwargs

    modules = up_projections(model)
    found: dict[str, list[Tensor]] = {name: [] for name in modules}

    def take(name: str, gradient: Tensor) -> Tensor:
        found[name].append(plain_scores([gradient], [modules[name].weight], config))
        return gradient

    task = kronfluence_task(list(modules), lambda model, batch: sample_losses(model, batch).sum(), take)
    model = prepare_model(model, task)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("scores", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate))
        identity = FactorArguments(strategy="identity")
        analyzer.fit_all_factors("identity", list(samples), per_device_batch_size=BATCH_SIZE, factor_args=identity)
        analyzer.compute_self_scores("own", "identity", list(samples), per_device_train_batch_size=BATCH_SIZE)
    unwrap(model, modules)
    return torch.stack([torch.cat(each) for each in found.values()]).mean(0)


def kronfluence_tuned(model: LlamaForCausalLM, samples: Sequence[Sample], config: ResonanceConfig) -> Tensor:
    """Its hooks without its analyzer; it gets back one entry of each gradient to process further."""
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.module.tracked_module import ModuleMode
    from kronfluence.module.utils import set_mode, update_factor_args

    modules, scores = up_projections(model), new_scores(samples)
    places: list[int] = []

    def take(name: str, gradient: Tensor) -> Tensor:
        scores[places] += changes(gradient, modules[name].weight, config)
        return gradient[:, :1, :1]

    task = kronfluence_task(list(modules), labelled_loss, take)
    model = prepare_model(model, task)
    update_factor_args(model, FactorArguments(strategy="identity"))
    set_mode(model, ModuleMode.SELF_SCORE, release_memory=True)
    for rows, batch in sorted_batches(samples):
        places[:] = rows
        task.compute_train_loss(batch, model).backward()
    set_mode(model, ModuleMode.DEFAULT, release_memory=True)
    unwrap(model, modules)
    return scores / len(modules)


def kronfluence_task(names: list[str], loss: Any, take: Any) -> Any:
    """A language model's task: the modules to track, the loss, and what takes each batch's gradients, (B, O, I)."""
    from kronfluence.task import Task

    class LanguageModeling(Task):
        enable_post_process_per_sample_gradient = True

        def compute_train_loss(self, batch: Sample, model: nn.Module, sample: bool = False) -> Tensor:
            return loss(model, batch)

        def compute_measurement(self, batch: Sample, model: nn.Module) -> Tensor:
            return loss(model, batch)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

        def get_attention_mask(self, batch: Sample) -> Tensor:
            return batch["attention_mask"]

        def post_process_per_sample_gradient(self, module_name: str, gradient: Tensor) -> Tensor:
            return take(module_name, gradient)

    return LanguageModeling()


def unwrap(model: nn.Module, modules: Mapping[str, nn.Linear]) -> None:
    """Restore the modules that kronfluence has wrapped."""
    for name, module in modules.items():
        model.set_submodule(name, module)


def bergson(model: LlamaForCausalLM, samples: Sequence[Sample], config: ResonanceConfig) -> Tensor:
    """`bergson build` with a model in memory: the gradients are stored on disk, and then the formula reads them."""
    from bergson import GradientProcessor, IndexConfig, collect_gradients, load_module_gradients
    from bergson.data import allocate_batches
    from datasets import Dataset

    modules = {name.removeprefix("model."): module for name, module in up_projections(model).items()}
    model.requires_grad_(False)  # these two lines are Bergson's own set-up of a model
    model.get_input_embeddings().requires_grad_(True)
    data = Dataset.from_list(as_rows(samples))
    with tempfile.TemporaryDirectory() as folder:
        cfg = IndexConfig(run_path=str(Path(folder) / "index"), loss_reduction="mean")
        lengths = [len(sample["input_ids"]) for sample in samples]
        batches = allocate_batches(lengths, cfg.token_batch_size, max_batch_size=BATCH_SIZE)
        collect_gradients(model, data, GradientProcessor(), cfg, batches=batches, target_modules=set(modules))
        store, scores = load_module_gradients(cfg.partial_run_path), []
        for rows in in_batches(range(len(samples))):
            gradients = [
                torch.from_numpy(store[name][rows]).view(-1, *module.weight.shape) for name, module in modules.items()
            ]
            scores.append(plain_scores(gradients, [module.weight for module in modules.values()], config))
    return torch.cat(scores)


def bergson_tuned(model: LlamaForCausalLM, samples: Sequence[Sample], config: ResonanceConfig) -> Tensor:
    """A custom collector in our loop, which scores each module's gradients as soon as they are computed."""
    from bergson.collector.collector import HookCollectorBase

    named, scores = up_projections(model), new_scores(samples)

    @dataclass(kw_only=True)
    class Scores(HookCollectorBase):
        def setup(self) -> None: ...

        def teardown(self) -> None: ...

        def process_batch(self, indices: list[int], **kwargs: Any) -> None:
            self.rows = indices

        def backward_hook(self, module: nn.Linear, g: Tensor) -> None:
            gradients = self._module_gradient(module, g).materialize()
            scores[self.rows] += changes(gradients, module.weight, config)

    modules = list(named.values())
    train_only(model, modules[:1])  # the others' outputs depend on it
    lowest = Output(modules[0])
    with Scores(model=model, target_modules=set(named)) as collector:
        for rows, batch in sorted_batches(samples):
            collector.process_batch(rows)
            torch.autograd.grad(labelled_loss(model, batch), lowest.take())
    lowest.remove()
    return scores / len(modules)


def torch_func(model: LlamaForCausalLM, samples: Sequence[Sample], config: ResonanceConfig) -> Tensor:
    """`torch.func.grad` over the three weights, sample by sample, with the head at learnt positions only."""
    modules, scores = up_projections(model), new_scores(samples)
    train_only(model, [])
    weights = {f"{name}.weight": module.weight.detach() for name, module in modules.items()}

    def loss(weights: dict[str, Tensor], sample: Sample) -> Tensor:
        targets = sample["labels"][1:]
        positions = (targets != IGNORE).nonzero()[:, 0]
        arguments = {"input_ids": sample["input_ids"][None], "use_cache": False, "logits_to_keep": positions}
        logits = torch.func.functional_call(model, weights, (), arguments).logits[0]
        return F.cross_entropy(logits, targets[positions])

    gradients_of = torch.func.grad(loss)
    for row, sample in enumerate(samples):
        for name, gradient in gradients_of(weights, sample).items():
            scores[row] += changes(gradient[None], weights[name], config)[0]
    return scores / len(modules)


METHODS: dict[str, Method] = {
    "opacus": opacus,
    "opacus_tuned": opacus_tuned,
    "kronfluence": kronfluence,
    "kronfluence_tuned": kronfluence_tuned,
    "bergson": bergson,
    "bergson_tuned": bergson_tuned,
    "torch_func": torch_func,
}


class Output:
    """A module's last output, at which autograd stops; its hook runs before all other hooks."""

    def __init__(self, module: nn.Module) -> None:
        self._found: list[Tensor] = []
        self._handle = module.register_forward_hook(lambda module, args, output: self._found.append(output))

    def take(self) -> Tensor:
        """Return the output, and forget it."""
        return self._found.pop()

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()


def up_projections(model: LlamaForCausalLM, count: int = 3) -> dict[str, nn.Linear]:
    """The last layers' up-projections by name, the lowest first."""
    layers = list(model.model.layers)
    first = len(layers) - count
    return {f"model.layers.{first + i}.mlp.up_proj": layer.mlp.up_proj for i, layer in enumerate(layers[first:])}


def train_only(model: nn.Module, modules: Any) -> list[nn.Parameter]:
    """Freeze everything but the weights of some modules, and return these weights."""
    model.requires_grad_(False)
    weights = [module.weight for module in modules]
    for weight in weights:
        weight.requires_grad_(True)
    return weights


def sample_losses(model: nn.Module, batch: Sample) -> Tensor:
    """(B,) each sample's mean token loss, with every logit."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view_as(labels).sum(1) / (labels != IGNORE).sum(1)


def labelled_loss(model: LlamaForCausalLM, batch: Sample) -> Tensor:
    """The sum of the samples' mean token losses, with the head at learnt positions only."""
    body = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    learnt = batch["labels"][:, 1:] != IGNORE
    logits = model.lm_head(body.last_hidden_state[:, :-1][learnt])
    losses = F.cross_entropy(logits, batch["labels"][:, 1:][learnt], reduction="none")
    counts = learnt.sum(1)
    return (losses / counts.repeat_interleave(counts)).sum()


@torch.no_grad()
def plain_scores(gradients: Sequence[Tensor], weights: Sequence[Tensor], config: ResonanceConfig) -> Tensor:
    """The formula as written, on whole batches of gradients, each (B, O, I)."""
    layers = []
    for gradient, weight in zip(gradients, weights, strict=True):
        change = config.lr * (gradient / (gradient.abs() + config.eps) + config.weight_decay * weight)
        layers.append(change.abs().mean((1, 2)))
    return torch.stack(layers).mean(0)


@torch.no_grad()
def changes(gradients: Tensor, weight: Tensor, config: ResonanceConfig) -> Tensor:
    """One layer's change for each sample, (B,), by our own arithmetic; overwrites the gradients (B, O, I)."""
    rows = max(1, TILE_ENTRIES["cpu"] // weight.shape[1])
    tiles = list(weight.detach().split(rows))
    sums = [
        torch.stack([tile_sum(own, tile, config) for own, tile in zip(gradient.split(rows), tiles, strict=True)]).sum()
        for gradient in gradients
    ]
    return config.lr * (1 - torch.stack(sums) / weight.numel())


def new_scores(samples: Sequence[Sample]) -> Tensor:
    return torch.zeros(len(samples), dtype=torch.float64)
