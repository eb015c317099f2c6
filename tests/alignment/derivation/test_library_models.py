"""Models of diffusers and transformers: what is derived keeps the function, and is all that there is by hand count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from remelt.alignment.derivation.tracing import groups_from_module

WORDS = torch.arange(7)[None] * 5 % 31
HIDDEN = torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(1))
LATENT = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
IMAGE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
TIME = torch.tensor([5])


def unet(*, crossed_first: bool = True, **options: Any) -> nn.Module:
    """A small U-Net: two levels of one residual block, transformers on the first or the second."""
    down = ["CrossAttnDownBlock2D", "DownBlock2D"]
    up = ["UpBlock2D", "CrossAttnUpBlock2D"]
    return diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), norm_num_groups=4, cross_attention_dim=12, layers_per_block=1,
        down_block_types=down if crossed_first else down[::-1],
        up_block_types=up if crossed_first else up[::-1], **options,
    )  # fmt: skip


class Autoencoder(nn.Module):
    """Both halves of an autoencoder, with the latent channels as outputs and inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = diffusers.AutoencoderKL(
            block_out_channels=(16, 32), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip

    def forward(self, image: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        return self.vae.quant_conv(self.vae.encoder(image)), self.vae.decode(latent, return_dict=False)[0]


class Pooled(nn.Module):
    """A text encoder of which only what it makes of the whole text is seen."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.CLIPTextConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=31,
            projection_dim=12, bos_token_id=0, eos_token_id=30, max_position_embeddings=16,
        )  # fmt: skip
        self.text = transformers.CLIPTextModelWithProjection(config)

    def forward(self, words: Tensor) -> Tensor:
        return self.text(words).text_embeds


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        caption_projection_dim=16, pooled_projection_dim=10, in_channels=4, out_channels=4, pos_embed_max_size=6,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def decoder(name: str, **options: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=31, head_dim=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config)


def mixture(implementation: str) -> nn.Module:
    model = decoder("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=10, decoder_sparse_step=1)
    model.set_experts_implementation(implementation)
    return model


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    return transformers.ViTForImageClassification(config)


# Of each of four transformers: its stream, both attentions, the feed-forward network.
CROSSED = [*["16"] * 3, *["2(8 8)"] * 6, *["64"] * 3, "32", *["2(16 16)"] * 2, "128"]
# Residual blocks inside; conv_in, two samplers and the shortcuts of five blocks begin streams that GroupNorms divide.
RESIDUAL = [*["4(4)"] * 2, "4(4)", *["4(8)"] * 5, *["4+4+4+4"] * 3, "4(4)", "8+8+8+8", *["12+12+8"] * 2, "32"]
EMBEDDED = ["64", "64"]
# Here the transformers are twice as deep, and on the lower level.
DEEP = [*["32"] * 4, *["2(16 16)"] * 16, *["128"] * 8]
BESIDE_DEEP = [
    *["4(4)"] * 2,
    "4(4)",
    *["4(8)"] * 6,
    *["4+4+4+4"] * 2,
    "2(8)",
    "8+8+8+8",
    "8+4+4+8+8",
    "12+12+8",
    "4(4)",
]
ENCODER = [*["4(4)"] * 3, *["4(8)"] * 4, "32", "32", "8"]
DECODER = [*["4(4)"] * 3, *["4(8)"] * 6, "32", "32", "4"]
TIMES = {"sample": LATENT, "timestep": TIME, "encoder_hidden_states": HIDDEN}
LANGUAGE = {"input_ids": WORDS, "use_cache": False}
POOLED = HIDDEN[:, 0, :10]
SD3 = {
    "hidden_states": LATENT,
    "encoder_hidden_states": HIDDEN,
    "pooled_projections": POOLED,
    "timestep": TIME,
}
FLUX = {
    "hidden_states": LATENT.reshape(1, 16, 16), "encoder_hidden_states": HIDDEN, "timestep": torch.tensor([0.5]),
    "pooled_projections": POOLED, "img_ids": torch.ones(16, 3), "txt_ids": torch.zeros(3, 3),
    "guidance": torch.tensor([3.5]),
}  # fmt: skip
ADDED = {"text_embeds": POOLED, "time_ids": torch.arange(6.0)[None]}
ROTARY = {f"model.layers.0.self_attn.{one}_norm.weight" for one in "qk"}
ROTARY_OF_FLUX = {
    *(f"transformer_blocks.0.attn.norm_{one}.weight" for one in ("q", "k", "added_q", "added_k")),
    *(f"single_transformer_blocks.0.attn.norm_{one}.weight" for one in "qk"),
}
"""What rotary embeddings fix."""

LAST = {"conv_out.bias"}
# What can be permuted, counted by hand, and the tensors of which nothing can.
MODELS: dict[str, tuple[Callable[[], nn.Module], Mapping[str, Any], list[str], set[str]]] = {
    "sd15": (lambda: unet(attention_head_dim=2), TIMES, [*CROSSED, *RESIDUAL, *EMBEDDED], LAST),
    "sd21": (
        lambda: unet(attention_head_dim=(2, 2), use_linear_projection=True), TIMES,
        [*CROSSED, *RESIDUAL, *EMBEDDED], LAST,
    ),
    "sdxl": (
        lambda: unet(
            crossed_first=False, attention_head_dim=(2, 2), use_linear_projection=True,
            transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=34,
        ),
        {**TIMES, "added_cond_kwargs": ADDED}, [*DEEP, *BESIDE_DEEP, *EMBEDDED, "64"], LAST,
    ),
    "vae": (
        Autoencoder, {"image": IMAGE, "latent": LATENT},
        [*ENCODER, *DECODER], {"vae.quant_conv.bias", "vae.decoder.conv_out.bias"},
    ),
    "clip": (Pooled, {"words": WORDS}, ["16", "24", "24", "2(8 8)", "2(8 8)"], set()),
    "sd3": (sd3, SD3, [*["16"] * 5, *["2(8) 8"] * 3, *["64"] * 3], {"proj_out.bias"}),
    "flux": (flux, FLUX, [*["32"] * 5, *["2(16)"] * 2, *["128"] * 3], {"proj_out.bias", *ROTARY_OF_FLUX}),
    "llama": (lambda: decoder("Llama"), LANGUAGE, ["32", "48", "2(4 4)"], set()),
    "tied": (
        lambda: decoder("Llama", tie_word_embeddings=True, attn_implementation="eager"), LANGUAGE,
        ["32", "48", "2(4 4)"], set(),
    ),
    "qwen3": (lambda: decoder("Qwen3"), LANGUAGE, ["32", "48", "2(4 4)"], ROTARY),
    "phi3": (lambda: decoder("Phi3"), LANGUAGE, ["32", "48", "2(4 4)"], set()),
    "mixture": (lambda: mixture("batched_mm"), LANGUAGE, ["32", "4(10)", "2(4 4)"], ROTARY),
    "vit": (vit, {"pixel_values": IMAGE}, ["16", "24", "24", "2(8 8)", "2(8 8)"], {"classifier.bias"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_all_that_can_be_permuted_is_found_and_keeps_the_function(
    name: str, trial: Callable[..., Any], assert_caught: Callable[[Any], None]
) -> None:
    make, keywords, groups, still = MODELS[name]
    found = trial(make(), **keywords)
    assert found.spelled == sorted(groups)
    assert found.still == still
    assert found.error_of(found.free, seeds=2) < 1e-10
    assert_caught(found)


def test_a_mixture_whose_rows_are_sorted_keeps_its_experts_but_not_their_hidden_channels_in_place(
    trial: Callable[..., Any],
) -> None:
    # sorting by expert tells experts apart; their matrices still have hidden channels of their own
    batched = trial(mixture("batched_mm"), **LANGUAGE)
    sorted_rows = mixture("grouped_mm")
    free = [group for group in groups_from_module(sorted_rows, (), LANGUAGE) if not group.is_fixed]
    assert [group.structure for group in free].count("experts") == 1
    assert batched.error_of(free) < 1e-10
    (experts,) = (group for group in free if group.structure == "experts")
    assert experts.levels[0].fixed and experts.levels[1].size == 10
    assert experts.order() == pytest.approx(4 * sum(np.log(np.arange(1, 11))))
