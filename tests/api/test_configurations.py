"""A single file becomes a folder that diffusers loads, component by component and whole, without another folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import remelt as rm
from remelt.archs.shapes import image_shapes, sd1_shapes, sd2_shapes
from remelt.cli.main import run

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79, 32, 98]])


def clip(projected: bool, heads: int, layers: int = 2, act: str = "quick_gelu") -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=4 * heads, intermediate_size=8 * heads, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=100, projection_dim=4 * heads, hidden_act=act, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def t5(width: int) -> Any:
    sizes = {"vocab_size": 100, "d_model": width, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu"))


def vae(latent: int, **more: Any) -> Any:
    if latent == 16:
        more |= {"use_quant_conv": False, "use_post_quant_conv": False}
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), layers_per_block=2, norm_num_groups=8, latent_channels=latent,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **more,
    )  # fmt: skip


def unet(widths: tuple[int, ...], heads: Any, attended: str, **config: Any) -> Any:
    """A U-Net whose levels attend to the text where ``attended`` has "x"."""
    down = tuple("CrossAttnDownBlock2D" if one == "x" else "DownBlock2D" for one in attended)
    up = tuple("CrossAttnUpBlock2D" if one == "x" else "UpBlock2D" for one in reversed(attended))
    config |= {"down_block_types": down, "up_block_types": up, "norm_num_groups": 8 if widths[0] % 16 else 16}
    return diffusers.UNet2DConditionModel(
        block_out_channels=widths, layers_per_block=2, attention_head_dim=heads, **config
    )


def xl(context: int, size: int, **more: Any) -> dict[str, Any]:
    return {
        "cross_attention_dim": context, "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": size, **more,
    }  # fmt: skip


def sd1(channels: int = 4) -> dict[str, Any]:
    denoiser = unet((16, 16, 32, 32), 8, "xxx-", cross_attention_dim=48, sample_size=64, in_channels=channels)
    return {"unet": denoiser, "vae": vae(4, scaling_factor=0.18215), "text_encoder": clip(False, 12)}


def sd2() -> dict[str, Any]:
    heads, widths = [5, 10, 20, 20], (40, 80, 160, 160)
    denoiser = unet(widths, heads, "xxx-", cross_attention_dim=64, use_linear_projection=True, sample_size=64)
    return {"unet": denoiser, "vae": vae(4), "text_encoder": clip(False, 16, 23, "gelu")}


def sdxl() -> dict[str, Any]:
    denoiser = unet((40, 80, 160), [5, 10, 20], "-xx", **xl(128, 80 + 48, transformer_layers_per_block=(1, 1, 2)))
    encoders = {"text_encoder": clip(False, 12), "text_encoder_2": clip(True, 20, act="gelu")}
    return {"unet": denoiser, "vae": vae(4, scaling_factor=0.13025), **encoders}


def refiner() -> dict[str, Any]:
    heads, widths = [6, 12, 24, 24], (48, 96, 192, 192)
    denoiser = unet(widths, heads, "-xx-", **xl(80, 80 + 40, transformer_layers_per_block=4))
    return {"unet": denoiser, "vae": vae(4, scaling_factor=0.13025), "text_encoder_2": clip(True, 20, act="gelu")}


def sd3() -> dict[str, Any]:
    denoiser = diffusers.SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=8,
        num_attention_heads=3, joint_attention_dim=32, caption_projection_dim=24, pooled_projection_dim=128,
        pos_embed_max_size=12,
    )  # fmt: skip
    encoders = {"text_encoder": clip(True, 12), "text_encoder_2": clip(True, 20, act="gelu"), "text_encoder_3": t5(32)}
    return {"transformer": denoiser, "vae": vae(16, scaling_factor=1.5305, shift_factor=0.0609), **encoders}


def flux() -> dict[str, Any]:
    denoiser = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=48, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    encoders = {"text_encoder": clip(False, 12), "text_encoder_2": t5(32)}
    return {"transformer": denoiser, "vae": vae(16, scaling_factor=0.3611, shift_factor=0.1159), **encoders}


MODELS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "sd1": ("StableDiffusionPipeline", sd1),
    "sd1 inpainting": ("StableDiffusionInpaintPipeline", lambda: sd1(9)),
    "sd1 pix2pix": ("StableDiffusionInstructPix2PixPipeline", lambda: sd1(8)),
    "sd2": ("StableDiffusionPipeline", sd2),
    "sdxl": ("StableDiffusionXLPipeline", sdxl),
    "sdxl_refiner": ("StableDiffusionXLImg2ImgPipeline", refiner),
    "sd3": ("StableDiffusion3Pipeline", sd3),
    "flux": ("FluxPipeline", flux),
}


def made_of(name: str, module: Any) -> torch.Tensor:
    """What a component makes of fixed numbers."""
    drawn = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=drawn)

    config, time = module.config, torch.tensor([7.0])
    with torch.no_grad():
        if name.startswith("text_encoder"):
            found = module(IDS)
            return found[0]
        if name == "vae":
            return module(noise(1, 3, 32, 32)).sample
        if name == "unet":
            pooled = getattr(config, "projection_class_embeddings_input_dim", None)
            numbers = 6 if len(config.block_out_channels) == 3 else 5
            told = {}
            if pooled:
                size = pooled - numbers * config.addition_time_embed_dim
                told = {"text_embeds": noise(1, size), "time_ids": torch.arange(float(numbers))[None]}
            text = noise(1, 5, config.cross_attention_dim)
            return module(noise(1, config.in_channels, 16, 16), time, text, added_cond_kwargs=told).sample
        text, whole = noise(1, 5, config.joint_attention_dim), noise(1, config.pooled_projection_dim)
        if "guidance_embeds" in config:
            ids = {"img_ids": torch.arange(48.0).view(16, 3), "txt_ids": torch.zeros(5, 3)}
            more = {"timestep": time / 10, "guidance": time, **ids}
            return module(noise(1, 16, 64), encoder_hidden_states=text, pooled_projections=whole, **more).sample
        return module(noise(1, 16, 16, 16), text, whole, time).sample


@pytest.mark.parametrize("name", MODELS)
def test_a_single_file_becomes_a_folder_whose_components_load_and_do_the_same(name: str, tmp_path: Path) -> None:
    kind, make = MODELS[name]
    torch.manual_seed(0)
    modules = make()
    index: dict[str, Any] = {"_class_name": kind}
    for part, module in modules.items():
        module.eval().save_pretrained(tmp_path / "given" / part)
        index[part] = ["transformers" if part.startswith("text") else "diffusers", type(module).__name__]
    (tmp_path / "given" / "model_index.json").write_text(json.dumps(index))
    single = rm.convert(tmp_path / "given", tmp_path / "single.safetensors", to="original")
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(single), bare)
    there = rm.convert(bare, tmp_path / "there", to="diffusers")
    for part, module in modules.items():
        loaded = type(module).from_pretrained(there / part).eval()
        assert loaded.state_dict().keys() == module.state_dict().keys()
        assert torch.equal(made_of(part, loaded), made_of(part, module)), part
    tokenizers = [part.replace("text_encoder", "tokenizer") for part in modules if part.startswith("text_encoder")]
    whole = diffusers.DiffusionPipeline.from_pretrained(there, **dict.fromkeys(tokenizers))
    assert type(whole).__name__ == kind
    assert {part for part in whole.components if whole.components[part] is not None} >= {*modules, "scheduler"}
    if "text_encoder" in modules:
        told = json.loads((there / "model_index.json").read_text())
        assert [told[part][0] for part in tokenizers] == ["transformers"] * len(tokenizers)


def test_a_merge_to_a_folder_is_told_too_and_runs(tmp_path: Path) -> None:
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        for part, module in sd1().items():
            module.save_pretrained(tmp_path / str(seed) / part)
        paths.append(rm.convert(tmp_path / str(seed), tmp_path / f"{seed}.safetensors", to="original"))
    mixed = rm.merge(rm.weighted_sum(*paths), tmp_path / "mixed", dialect="diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(mixed, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    embeds = pipe.text_encoder(IDS)[0]
    made = pipe(
        prompt_embeds=embeds, negative_prompt_embeds=torch.zeros_like(embeds), height=64, width=64,
        num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert torch.isfinite(made).all() and made.std() > 0


Remelt = Callable[..., tuple[int, str, str]]


@pytest.fixture
def remelt(capsys: pytest.CaptureFixture[str]) -> Remelt:
    def call(*words: object) -> tuple[int, str, str]:
        code = run([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def drawn(folder: Path, shapes: Any, metadata: dict[str, str] | None = None) -> Path:
    path = folder / "model.safetensors"
    save_file({key: torch.ones(info.shape) for key, info in shapes.items()}, path, metadata)
    return path


def test_what_is_missing_is_told_with_the_remedy(remelt: Remelt, tmp_path: Path) -> None:
    given = drawn(tmp_path, sd1_shapes(32))
    code, _, err = remelt("convert", given, "--to", "diffusers", "-o", tmp_path / "there")
    assert code == 0
    assert err == (
        "warning: no configuration is known of unet: --like FOLDER takes it from a model of the same shapes\n"
        "warning: tokenizer is in no checkpoint, and diffusers asks for it: --like FOLDER takes it from a model of the "
        "same make\n"
    )
    written = sorted(path.relative_to(tmp_path / "there").as_posix() for path in (tmp_path / "there").rglob("*.json"))
    assert written == [
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "vae/config.json",
    ]  # fmt: skip
    # A folder whose model has configurations, or which is given with --like, is told nothing anew.
    code, _, err = remelt("convert", given, "--to", "diffusers", "--like", tmp_path / "there", "-o", tmp_path / "like")
    assert (code, err) == (0, "")
    code, _, err = remelt("merge", tmp_path / "there", tmp_path / "there", "-m", "weighted_sum", "-o", tmp_path / "m")
    assert code == 0 and "--like" not in err


def test_an_arch_without_known_configurations_is_told(remelt: Remelt, tmp_path: Path) -> None:
    given = drawn(tmp_path, image_shapes("auraflow", 64))
    code, out, _ = remelt("convert", given, "--to", "diffusers", "-o", tmp_path / "there", "--json")
    assert code == 0
    assert json.loads(out)["warnings"] == [
        "no configuration is known of auraflow: --like FOLDER takes it from a model of the same shapes"
    ]


@pytest.mark.parametrize(
    ("told", "words", "expected", "size"),
    [
        ({}, (), "v_prediction", 96),
        ({}, ("--modelspec", "prediction_type", "epsilon"), "epsilon", 64),
        ({"modelspec.prediction_type": "epsilon", "modelspec.resolution": "640x640"}, (), "epsilon", 80),
    ],
)
def test_what_sd2_predicts_is_asked_or_told(
    remelt: Remelt, tmp_path: Path, told: dict[str, str], words: tuple[str, ...], expected: str, size: int
) -> None:
    given = drawn(tmp_path, sd2_shapes(64), told)
    code, _, err = remelt("convert", given, "--to", "diffusers", "-o", tmp_path / "there", *words)
    assert code == 0
    assert ("what the model predicts, and its scheduler is told velocity" in err) is (not told and not words)
    scheduler = json.loads((tmp_path / "there" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == expected
    assert json.loads((tmp_path / "there" / "unet" / "config.json").read_text())["sample_size"] == size


def test_a_component_alone_has_its_configuration_beside_it(tmp_path: Path) -> None:
    start = "model.diffusion_model."
    shapes = {key.removeprefix(start): info for key, info in sd1_shapes(8).items() if key.startswith(start)}
    there = rm.convert(drawn(tmp_path, shapes), tmp_path / "there", to="diffusers")
    assert sorted(path.name for path in there.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = diffusers.UNet2DConditionModel.from_pretrained(there)
    assert loaded.config.block_out_channels == [40, 80, 160, 160]
