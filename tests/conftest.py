"""Offline and quiet on every machine, the long files first, and the fixtures that most tests use."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile

gc.disable()  # until everything is imported
CACHE = tempfile.mkdtemp()  # the user's own is left alone
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ.update(HF_HOME=CACHE, HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRANSFORMERS_VERBOSITY="error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads only wait for each other

from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from helpers.tokenizers import make_tokenizer
from helpers.versions import all_there
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from resofilter_trainer.config import VersionError

hypothesis.settings.register_profile(
    "untimed", hypothesis.settings.default, deadline=None
)  # machines are shared: tests assert no times
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).parents[1]

LONGEST_FIRST = (  # files, and folders: no process has a long file left when the others have nothing to do
    "tests/training/test_callback_sharded.py",
    "tests/benchmarks/test_real_models.py",
    "tests/demo/test_demo.py",
    "tests/compare/test_comparison_run.py",
    "tests/training/test_callback_resume.py",
    "tests/training/test_callback.py",
    "tests/training/test_packing.py",
    "tests/training/test_stream.py",
    "tests/docs/test_documented_examples.py",
    "tests/test_kills.py",
    "tests/training/test_callback_processes.py",
    "tests/scoring/test_scoring_processes.py",
    "tests/training/test_callback_tokens.py",
    "tests/report/test_report_page.py",
    "tests/benchmarks/test_benchmark_scoring.py",
    "tests/training",
    "tests/compare",
    "tests/tokens",
    "tests/scoring",
    "tests/model",
)


def pytest_configure(config: pytest.Config) -> None:
    """`--dist loadfile` would begin with the files that have most tests: keep the order of the collection instead."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {ROOT / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: min(rank.get(each, len(rank)) for each in (item.path, item.path.parent)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Every training ends with a collection of garbage: it does not look through the million objects of imports."""
    gc.freeze()
    gc.enable()


def _skip_what_older_versions_lack() -> Iterator[None]:
    try:
        yield
    except VersionError as error:
        if all_there():
            raise
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    yield from _skip_what_older_versions_lack()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    yield from _skip_what_older_versions_lack()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    """A factory: `tiny_llama(seed=0, dtype=torch.float32)`, four layers, in evaluation mode."""

    def build(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        return LlamaForCausalLM(config).to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable, tokenizer) -> Path:
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def settings_end_with_their_training() -> Iterator[None]:
    """transformers 4 leaves the precision and the compiler of a training to the next one, in the environment."""
    yield
    for name in [each for each in os.environ if each.startswith(("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_"))]:
        del os.environ[name]
