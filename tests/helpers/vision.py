"""Tiny vision-language models, a processor and rows with images, all made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from datasets import Dataset
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaProcessor

from helpers.versions import older_than
from helpers.zen import TEMPLATE, zen, zen_tokenizer

IMAGE = "<image>"
SIDE, PATCH = 16, 8  # pixels
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "max_position_embeddings": 256,
}
EYE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_EYE = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
ROPE = {
    "rope_scaling" if older_than("transformers", "5.0") else "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [1, 1, 2],
        "rope_theta": 1e4,
    }
}
CLIP = "CLIPImageProcessor" if older_than("transformers", "5.4") else "CLIPImageProcessorPil"  # the one without torch

VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"text_config": {**TEXT, **ROPE}, "vision_config": QWEN_EYE, "image_token_id": 3},
    "gemma3": {"text_config": TEXT, "vision_config": {**EYE, "image_size": SIDE, "patch_size": PATCH}}
    | {"mm_tokens_per_image": 4, "image_token_index": 3},
    "llava": {"text_config": {"model_type": "llama", **TEXT}}
    | {"vision_config": {"model_type": "clip_vision_model", **EYE, "image_size": SIDE, "patch_size": PATCH}},
}


def vision_model(family: str) -> Callable[[int], Any]:
    """A function that makes the model, with a token more than it is asked for: that of an image."""

    def build(size: int) -> Any:
        torch.manual_seed(0)
        settings = {"image_token_index": size, **VISION[family]} if family == "llava" else VISION[family]
        text = {**settings["text_config"], "vocab_size": size + 1}
        config = AutoConfig.for_model(family, **{**settings, "text_config": text})
        return AutoModelForImageTextToText.from_config(config).eval()

    return build


def make_processor() -> LlavaProcessor:
    """The processor of the tiny llava: the tokenizer of the other tests with a token for images."""
    tokenizer = zen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    content = "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    template = TEMPLATE.replace("{{ m['content'] or '' }}", content)
    template = template.replace("{{ m['content'] + '<|end|>' }}", content + "{{ '<|end|>' }}")
    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        image_processor=getattr(transformers, CLIP)(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def image_rows() -> Dataset:
    """Messages, each about an image."""
    shades = [Image.new("RGB", (SIDE, SIDE), (15 * i, 255 - 15 * i, 0)) for i in range(17)]
    return Dataset.from_list([{**row, "images": [shade]} for row, shade in zip(zen("messages"), shades, strict=True)])
