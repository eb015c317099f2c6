"""Decoders of transformers: words go in, scores of the next words come out. Mixtures of experts among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from remelt.alignment.instances.instance import Instance, instance_of, missing
from remelt.alignment.instances.layouts import renamed
from remelt.alignment.instances.precision import InDouble
from remelt.archs.axes.heads import HeadRule

_WORDS, _LENGTH, _LAYERS, _HEADS, _EXPERTS, _CHOSEN = 48, 9, 2, 8, 6, 2
_NARROW = 64
"""Below this width heads have 12 channels, from it on 24."""


class Decoder(nn.Module):
    """A decoder that keeps nothing of what it read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor) -> Tensor:
        with InDouble():
            found: Tensor = self.model(input_ids=words, use_cache=False).logits
        return found


class Expert(nn.Module):
    """A gated feed-forward network, with the names of Mixtral's files."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, seen: Tensor) -> Tensor:
        found: Tensor = self.w2(nn.functional.silu(self.w1(seen)) * self.w3(seen))
        return found


class Experts(nn.ModuleList):
    """Experts with tensors of their own, as files have them; all compute, and what the router gives them counts."""

    def forward(self, seen: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        shares = torch.zeros(len(seen), len(self), dtype=seen.dtype).scatter(1, chosen, weights.to(seen.dtype))
        return torch.stack([one(seen) for one in self], dim=1).mul(shares.unsqueeze(-1)).sum(1)


def decoder_instance(arch: str, width: int = 32, seed: int = 0) -> Instance:
    """A decoder of one of `DECODERS`: ``width`` is that of its stream, an even number.

    Two of eight heads of queries share one of keys and values. All together they are wider than the stream, so that one
    cannot be taken for the other.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise missing(error) from error
    (name, of_text), options = DECODERS[arch]
    head = 12 if width < _NARROW else 24
    config = getattr(transformers, f"{name}{of_text}Config")(
        vocab_size=_WORDS, hidden_size=width, num_hidden_layers=_LAYERS, num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS // 2, head_dim=head, intermediate_size=2 * width, max_position_embeddings=32,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options(width),
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    inputs = (torch.randint(0, _WORDS, (2, _LENGTH), generator=torch.Generator().manual_seed(seed + 1)),)
    if arch == "mixtral":
        for layer in model.model.layers:
            layer.mlp.experts = Experts(Expert(width, width) for _ in range(_EXPERTS))
    module, names = Decoder(model), {"model.": ""}
    if arch == "mixtral":
        names |= {".mlp.experts.": ".block_sparse_moe.experts.", ".mlp.gate.": ".block_sparse_moe.gate."}
    originals, parameters = renamed(module, names)
    rules = {"model": HeadRule(size=model.model.layers[0].self_attn.head_dim)}
    return instance_of(arch, module, inputs, rules, seed=seed, originals=originals, parameters=parameters)


def _plain(width: int) -> dict[str, Any]:
    return {}


def _mixture(width: int) -> dict[str, Any]:
    return {"num_local_experts": _EXPERTS, "num_experts_per_tok": _CHOSEN}


def _many_experts(width: int) -> dict[str, Any]:
    return {
        "num_experts": _EXPERTS, "num_experts_per_tok": _CHOSEN, "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width + 16, "decoder_sparse_step": 1, "mlp_only_layers": [0],
        "norm_topk_prob": True, "experts_implementation": "eager",
    }  # fmt: skip


DECODERS: Mapping[str, tuple[tuple[str, str], Callable[[int], dict[str, Any]]]] = {
    "gemma2": (("Gemma2", ""), _plain),
    "gemma3": (("Gemma3", "Text"), _plain),
    "glm": (("Glm4", ""), _plain),
    "llama": (("Llama", ""), _plain),
    "mixtral": (("Mixtral", ""), _mixture),
    "phi3": (("Phi3", ""), _plain),
    "qwen2": (("Qwen2", ""), _plain),
    "qwen2_moe": (("Qwen2Moe", ""), _many_experts),
    "qwen3": (("Qwen3", ""), _plain),
    "qwen3_moe": (("Qwen3Moe", ""), _many_experts),
}
"""By arch: what transformers calls it, what it adds for the configuration alone, and further options of that."""
