"""A comparison that trains an adapter on the model: every training is one, and costs count what is trained."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)
from trl import SFTTrainer

from resofilter_trainer import InputError
from resofilter_trainer.compare.config import ComparisonConfig
from resofilter_trainer.compare.cost import parameters_of, trained_flops
from resofilter_trainer.compare.run import run
from resofilter_trainer.compare.training import lora_config, sft_config, train
from resofilter_trainer.training.fine_tuning import fine_tune

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


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.filterwarnings("ignore:Merge lora module to .-bit linear")
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_the_model_under_it_may_be_quantised(bits, compare, tiny_settings):
    pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
    (plain,) = run(compare(output="plain"))
    quantised = {**tiny_settings["training"], "model_init_kwargs": {"quantization_config": {bits: True}}}
    cells = run(compare(selectors=["full", "token_fixed", {"dynamics": "mean_loss"}], training=quantised))
    assert [cell.failure for cell in cells] == [""] * 3
    assert cells[0].training_flops == plain.training_flops


def test_what_has_no_gradient_stays_so_after_merging(compare, tiny_llama, tokenizer, tmp_path):
    model, config = tiny_llama(), compare()
    packed = torch.nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False)  # as quantised weights are
    model.model.register_parameter("packed", packed)
    rows = Dataset.from_list([{"prompt": "1 +", "completion": " 1"}] * 4)
    with torch.enable_grad():
        args = sft_config(config, config.model[0], 0)
        trained = fine_tune(model, rows, args, tokenizer, lora_config(config), tmp_path / "trainer")
    assert [name for name, each in trained.named_parameters() if not each.requires_grad] == ["model.packed"]


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


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_costs_count_a_copy_that_is_trained_and_not_its_original(saved, tied, compare, tiny_llama):
    config = tiny_llama().config
    head = config.vocab_size * config.hidden_size

    def flops(**settings) -> int:
        model = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "tie_word_embeddings": tied}))
        return trained_flops(get_peft_model(model, lora_config(compare(lora={**LORA, **settings}))).get_base_model())

    assert flops(modules_to_save=saved) - flops() == (2 * head if "lm_head" in saved else 0)


def test_costs_count_every_weight_that_four_bits_pack():
    class Params4bit(torch.nn.Parameter):  # as bitsandbytes names it: two entries in a byte
        pass

    layer = torch.nn.Linear(8, 4, bias=False)
    layer.weight = Params4bit(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    layer.get_input_embeddings = lambda: torch.nn.Embedding(2, 2)
    assert parameters_of(layer) == 32
    assert trained_flops(layer) == 4 * 32


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_may_begin_with_the_weights(init, compare):
    (cell,) = run(compare(lora={**LORA, "init_lora_weights": init}))
    assert cell.failure == ""


def test_a_comparison_of_a_version_without_adapters_is_resumed(compare, tmp_path):
    cells = run(compare(lora=None))
    path = tmp_path / "out" / "settings.json"
    settings = json.loads(path.read_text())
    assert settings.pop("lora") is None
    path.write_text(json.dumps(settings))
    assert run(compare(lora=None)) == cells
    with pytest.raises(InputError, match="they differ in lora"):
        run(compare())


def test_the_model_whose_training_tells_how_rows_are_learnt_must_take_it(compare, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("resofilter_trainer.compare.run.make_data", lambda *args: pytest.fail("it went on"))
    other = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=128))
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    selectors = [{"dynamics": "mean_loss", "score_model": str(tmp_path / "other")}]
    with pytest.raises(InputError, match=r"PEFT refuses the settings of lora for '.*other'"):
        run(compare(selectors=selectors, lora={"target_modules": ["up_proj"]}))


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
        ({"target_modules": ["up_proj", "lm_head"]}, "leave the output layer of .* out of target_modules"),
        ([1], "lora must be a mapping"),
    ],
)
def test_what_peft_refuses_is_one_line_before_anything_is_scored(lora, message, compare, monkeypatch):
    monkeypatch.setattr("resofilter_trainer.compare.run.make_data", lambda *args: pytest.fail("it went on"))
    with pytest.raises(InputError, match=message) as refused:
        run(compare(lora=lora))
    assert "\n" not in str(refused.value)
