"""Encoders of transformers that are files of their own: vision transformers that name what they see, and T5."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from remelt.alignment.instances.instance import Instance, instance_of, missing
from remelt.alignment.instances.layouts import renamed
from remelt.alignment.instances.precision import InDouble
from remelt.archs.axes.heads import HeadRule

_SIZE, _PATCH, _CLASSES, _WORDS, _LENGTH, _HEAD = 16, 4, 7, 32, 6, 8
VIT_NAMES = {
    "model.": "", "vit.layers.": "vit.encoder.layer.",
    ".attention.q_proj.": ".attention.attention.query.", ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.", ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.", ".mlp.fc2.": ".output.dense.",
}  # fmt: skip
"""What files call the modules of transformers' newer versions."""


class Classifier(nn.Module):
    """What a model sees in an image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.model(pixel_values=image).logits
        return found


class Translator(nn.Module):
    """T5 whole: words go in, and what is written so far; scores of the next words come out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor, written: Tensor) -> Tensor:
        with InDouble():
            found: Tensor = self.model(input_ids=words, decoder_input_ids=written, use_cache=False).logits
        return found


def vit_instance(width: int = 32, seed: int = 0) -> Instance:
    """A vision transformer with a head for classes: ``width`` is that of its stream, a multiple of 8."""
    try:
        from transformers import ViTConfig, ViTForImageClassification
    except ModuleNotFoundError as error:
        raise missing(error) from error
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=width // _HEAD, intermediate_size=2 * width,
        image_size=_SIZE, patch_size=_PATCH, num_labels=_CLASSES,
    )  # fmt: skip
    module = Classifier(ViTForImageClassification(config))
    image = torch.randn(2, 3, _SIZE, _SIZE, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    originals, parameters = renamed(module, VIT_NAMES)
    rules = {"vision": HeadRule(size=_HEAD)}
    return instance_of("vit", module, (image,), rules, seed=seed, originals=originals, parameters=parameters)


def t5_instance(width: int = 32, seed: int = 0) -> Instance:
    """T5 with its decoder: ``width`` is that of its stream, a multiple of 8."""
    try:
        from transformers import T5Config, T5ForConditionalGeneration
    except ModuleNotFoundError as error:
        raise missing(error) from error
    config = T5Config(
        vocab_size=_WORDS, d_model=width, d_kv=_HEAD, d_ff=2 * width, num_layers=2, num_heads=width // _HEAD + 1,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    module = Translator(T5ForConditionalGeneration(config))
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = tuple(torch.randint(1, _WORDS, (2, _LENGTH), generator=generator) for _ in range(2))
    originals, parameters = renamed(module, {"model.": ""})
    return instance_of("t5", module, inputs, {}, seed=seed, originals=originals, parameters=parameters)
