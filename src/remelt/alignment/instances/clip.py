"""CLIP whole: words and an image go in; both embeddings and their likeness come out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from remelt.alignment.instances.instance import Instance, instance_of, missing, same
from remelt.archs.axes.heads import HeadRule
from remelt.core.pieces import Converted
from remelt.core.tensor_info import TensorInfo

_WORDS, _PIXELS, _PATCH, _HEAD = 32, 16, 4, 8
_BELOW = "model."
"""What the module's names begin with, and the file's do not."""


class Likeness(nn.Module):
    """A model of texts and images, called with both."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The likeness of every text and image, and their embeddings."""
        found = self.model(input_ids=words, pixel_values=image)
        return found.logits_per_text, found.text_embeds, found.image_embeds


def clip_instance(width: int = 32, seed: int = 0, layers: int = 12) -> Instance:
    """CLIP in transformers' layout; ``width`` is that of its text encoder, a multiple of 16. It sees twice as wide."""
    try:
        from transformers import CLIPConfig, CLIPModel
    except ModuleNotFoundError as error:
        raise missing(error) from error
    sides = {
        "text_config": {
            "vocab_size": _WORDS, "bos_token_id": 0, "eos_token_id": _WORDS - 1, "pad_token_id": 0,
            "max_position_embeddings": 77, **_sizes(width, layers),
        },
        "vision_config": {"image_size": _PIXELS, "patch_size": _PATCH, **_sizes(2 * width, layers)},
    }  # fmt: skip
    module = Likeness(CLIPModel(CLIPConfig(**sides, projection_dim=width + 8)))
    generator = torch.Generator().manual_seed(seed + 1)
    words = torch.randint(1, _WORDS - 1, (2, 7), generator=generator)
    words[:, -1] = _WORDS - 1
    image = torch.randn(2, 3, _PIXELS, _PIXELS, generator=generator, dtype=torch.float64)
    heads = {"text": HeadRule(size=_HEAD), "vision": HeadRule(size=_HEAD)}
    return instance_of(
        "clip_l", module, (words, image), heads, seed=seed, originals=_outside_likeness, parameters=_inside_likeness
    )


def _outside_likeness(infos: Mapping[str, TensorInfo]) -> dict[str, Converted]:
    return {key.removeprefix(_BELOW): made for key, made in same(infos).items()}


def _inside_likeness(infos: Mapping[str, TensorInfo]) -> dict[str, Converted]:
    return {_BELOW + key: made for key, made in same(infos).items()}


def _sizes(width: int, layers: int) -> dict[str, object]:
    return {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": width // _HEAD, "hidden_act": "quick_gelu",
    }  # fmt: skip
