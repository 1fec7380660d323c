"""A comparison that trains an adapter on the model: every training is one, and costs count what is trained."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTTrainer

from resofilter_trainer import InputError
from resofilter_trainer.compare.config import ComparisonConfig
from resofilter_trainer.compare.cost import parameters_of, trained_flops
from resofilter_trainer.compare.run import run
from resofilter_trainer.compare.training import lora_config, sft_config, train

LORA = {"r": 2, "lora_alpha": "8e0", "target_modules": "all-linear"}  # YAML 1.1 reads such a number as text


@pytest.fixture
def compare(tiny_settings):
    def make(**changes) -> ComparisonConfig:
        return ComparisonConfig.of({**tiny_settings, "selectors": ["full"], "lora": LORA, **changes})

    return make


def test_a_training_is_that_of_sft_trainer_with_the_adapter(compare):
    config = compare()
    (model,) = config.model
    args, adapter = sft_config(config, model, 0), lora_config(config)
    rows = Dataset.from_list([{"prompt": f"{i} + 1", "completion": f"{i + 1}"} for i in range(8)])
    with torch.enable_grad():
        found = train(model, rows, None, args, adapter).model.state_dict()
        base, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
        settings = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=8, target_modules="all-linear")
        set_seed(args.seed)  # which TRL does itself, but not in every version before the adapter is made
        plain = SFTTrainer(base, copy.copy(args), train_dataset=rows, processing_class=tokenizer, peft_config=settings)
        plain.train()
    expected = base.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert torch.equal(
        found["model.layers.0.mlp.up_proj.base_layer.weight"], before["model.layers.0.mlp.up_proj.weight"]
    )
    assert found["model.layers.0.mlp.up_proj.lora_B.default.weight"].any()


def test_every_method_that_trains_takes_it(compare, tiny_settings):
    selectors = ["full", "resonance", "token_fixed", "token_self_evolving", {"dynamics": "mean_loss"}]
    config = compare(
        selectors=selectors, loss_dataset="tests.jsonl", training={**tiny_settings["training"], "num_train_epochs": 2}
    )
    cells = run(config)
    assert [cell.failure for cell in cells] == [""] * 5
    assert len({cell.held_out_loss for cell in cells}) == 5
    assert run(config) == cells


def test_costs_count_a_gradient_for_what_is_trained(compare, tiny_settings):
    (adapted,) = run(compare())
    (whole,) = run(compare(lora=None, output="whole"))
    model = AutoModelForCausalLM.from_pretrained(tiny_settings["model"])
    parameters = parameters_of(model)
    assert trained_flops(model) == 6 * parameters
    added = parameters_of(get_peft_model(model, lora_config(compare()))) - parameters
    assert added > 0
    assert adapted.training_flops / whole.training_flops == pytest.approx(
        (4 * parameters + 6 * added) / (6 * parameters)
    )


def test_it_is_another_comparison_than_one_of_all_weights(compare):
    run(compare())
    with pytest.raises(InputError, match=r"they differ in lora "):
        run(compare(lora={**LORA, "r": 3}))
    with pytest.raises(InputError, match=r"they differ in lora"):
        run(compare(lora=None))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 2}, "In lora, 'rank' is not a field of peft.LoraConfig"),
        ({"r": 0}, "PEFT refuses the settings of lora for .*: `r` should be a positive"),
        ({"target_modules": ["nothing"]}, "PEFT refuses the settings of lora for .*nothing"),
        ({"task_type": "SEQ_CLS"}, "leave task_type out"),
        ([1], "lora must be a mapping"),
    ],
)
def test_what_peft_refuses_is_one_line_before_anything_is_scored(lora, message, compare, monkeypatch):
    monkeypatch.setattr("resofilter_trainer.compare.run.make_data", lambda *args: pytest.fail("it went on"))
    with pytest.raises(InputError, match=message) as refused:
        run(compare(lora=lora))
    assert "\n" not in str(refused.value)
