"""Pipelines of diffusers in both layouts: merged in either, converted, loaded and run, they give the same image."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import remelt as rm
from remelt.archs.shapes import flux_shapes, sd1_shapes, sdxl_shapes
from remelt.cli.main import run
from remelt.errors import CheckError

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79, 32, 38]])


def text_encoder(kind: str, width: int) -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=2,
        vocab_size=100, projection_dim=width, eos_token_id=38,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def t5(width: int) -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=100, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )


def vae(latent: int) -> Any:
    quantised = {} if latent == 4 else {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06}
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), layers_per_block=2, norm_num_groups=4, latent_channels=latent,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **quantised,
    )  # fmt: skip


def unet(widths: tuple[int, ...], **config: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        block_out_channels=widths, layers_per_block=2, attention_head_dim=8, norm_num_groups=8, sample_size=8, **config
    )


class SD1:
    """Stable Diffusion 1.5."""

    alpha: ClassVar = {"IN01": 0.2}
    places: ClassVar = {"unet": {"down_blocks.0.resnets.0.": 0.2, "down_blocks.0.attentions.0.": 0.2}}

    def make(self) -> Any:
        down, up = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
        types = {"down_block_types": (*down, "DownBlock2D"), "up_block_types": ("UpBlock2D", *up)}
        return diffusers.StableDiffusionPipeline(
            vae=vae(4), text_encoder=text_encoder("CLIPTextModel", 32), tokenizer=None,
            unet=unet((16, 16, 32, 32), cross_attention_dim=32, **types), scheduler=diffusers.DDIMScheduler(),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    def inputs(self, pipe: Any) -> dict[str, Any]:
        embeds = pipe.text_encoder(IDS)[0]
        return {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds)}


class SDXL:
    """Stable Diffusion XL."""

    alpha: ClassVar = {"IN04": 0.2}
    places: ClassVar = {"unet": {"down_blocks.1.resnets.0.": 0.2, "down_blocks.1.attentions.0.": 0.2}}

    def make(self) -> Any:
        denoiser = unet(
            (16, 16, 32), cross_attention_dim=48, transformer_layers_per_block=(1, 1, 2), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=48 + 32,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        )  # fmt: skip
        return diffusers.StableDiffusionXLPipeline(
            vae=vae(4), unet=denoiser, text_encoder=text_encoder("CLIPTextModel", 16), tokenizer=None,
            text_encoder_2=text_encoder("CLIPTextModelWithProjection", 32), tokenizer_2=None,
            scheduler=diffusers.DDIMScheduler(),
        )  # fmt: skip

    def inputs(self, pipe: Any) -> dict[str, Any]:
        first = pipe.text_encoder(IDS, output_hidden_states=True).hidden_states[-2]
        second = pipe.text_encoder_2(IDS, output_hidden_states=True)
        embeds, pooled = torch.cat([first, second.hidden_states[-2]], -1), second.text_embeds
        return {
            "prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds),
            "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": torch.zeros_like(pooled),
        }  # fmt: skip


class SD3:
    """Stable Diffusion 3.5: norms of queries and keys, a second attention in its first block."""

    alpha: ClassVar = {"joint_blocks.1": 0.2}
    places: ClassVar = {"transformer": {"transformer_blocks.1.": 0.2}}

    def make(self) -> Any:
        denoiser = diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
            pos_embed_max_size=12, qk_norm="rms_norm", dual_attention_layers=(0,),
        )  # fmt: skip
        encoders = [text_encoder("CLIPTextModelWithProjection", 16) for _ in range(2)]
        return diffusers.StableDiffusion3Pipeline(
            transformer=denoiser, vae=vae(16), text_encoder=encoders[0], text_encoder_2=encoders[1],
            text_encoder_3=t5(32), tokenizer=None, tokenizer_2=None, tokenizer_3=None,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        )  # fmt: skip

    def inputs(self, pipe: Any) -> dict[str, Any]:
        both = [one(IDS, output_hidden_states=True) for one in (pipe.text_encoder, pipe.text_encoder_2)]
        seen = torch.cat([one.hidden_states[-2] for one in both], -1)
        embeds = torch.cat([seen, pipe.text_encoder_3(IDS)[0]], 1)
        pooled = torch.cat([one.text_embeds for one in both], -1)
        return {
            "prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds),
            "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": torch.zeros_like(pooled),
        }  # fmt: skip


class Flux:
    """Flux.1 with guidance."""

    alpha: ClassVar = {"double_blocks.1": 0.2, "single_blocks.0": 0.9}
    places: ClassVar = {"transformer": {"transformer_blocks.1.": 0.2, "single_transformer_blocks.0.": 0.9}}

    def make(self) -> Any:
        denoiser = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        )  # fmt: skip
        return diffusers.FluxPipeline(
            transformer=denoiser, vae=vae(16), text_encoder=text_encoder("CLIPTextModel", 16), tokenizer=None,
            text_encoder_2=t5(32), tokenizer_2=None, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        )  # fmt: skip

    def inputs(self, pipe: Any) -> dict[str, Any]:
        return {
            "prompt_embeds": pipe.text_encoder_2(IDS)[0],
            "pooled_prompt_embeds": pipe.text_encoder(IDS).pooler_output,
        }


KINDS: dict[str, Any] = {"sd1": SD1(), "sdxl": SDXL(), "sd3": SD3(), "flux": Flux()}


def image(kind: Any, pipe: Any) -> Tensor:
    """What a pipeline makes of some words in two steps."""
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        made: Tensor = pipe(
            **kind.inputs(pipe), height=64, width=64, num_inference_steps=2, output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
    assert torch.isfinite(made).all() and made.std() > 0
    return made


def modules_of(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """The tensors of all components of a folder."""
    return {
        f"{path.parent.name}/{key}": tensor
        for path in sorted(folder.glob("*/*.safetensors"))
        for key, tensor in load_file(path).items()
    }


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def merged_by_hand(kind: Any, a: Any, b: Any) -> Any:
    """A pipeline whose modules are those of two others, by torch: half of each, but for some blocks."""
    made = kind.make()
    for name, module in modules_of(made).items():
        ours, theirs = modules_of(a)[name].state_dict(), modules_of(b)[name].state_dict()
        state = {}
        for key in ours:
            starts = kind.places.get(name, {}).items()
            weight = next((weight for start, weight in starts if key.startswith(start)), 0.5)
            state[key] = ours[key] if key == "pos_embed.pos_embed" else torch.lerp(ours[key], theirs[key], weight)
        module.load_state_dict(state)
        module.eval()
    return made


@pytest.fixture(scope="module", params=list(KINDS))
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any, Any]:
    """A kind of pipeline, and two of it: in memory, as folders ``a`` and ``b``, and as single files."""
    kind, folder = KINDS[request.param], tmp_path_factory.mktemp(request.param)
    pipes = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        pipe = kind.make()
        for module in modules_of(pipe).values():
            module.eval()
        pipe.save_pretrained(folder / name)
        rm.convert(folder / name, folder / f"{name}.safetensors", to="original")
        pipes.append(pipe)
    return kind, folder, *pipes


def mix(kind: Any, a: Any, b: Any) -> Any:
    return rm.weighted_sum(rm.model(a), rm.model(b), alpha=rm.blocks(kind.alpha) | 0.5)


def test_a_merge_of_mixed_layouts_runs_as_one_by_hand(two: tuple[Any, Path, Any, Any], tmp_path: Path) -> None:
    kind, folder, a, b = two
    single = rm.merge(mix(kind, folder / "a.safetensors", folder / "b"), tmp_path / "mix.safetensors")
    assert all("/" not in key for key in load_file(single))
    back = rm.convert(single, tmp_path / "mix-there", to="diffusers", like=folder / "a")
    loaded = type(a).from_pretrained(back, **{part: None for part, found in a.components.items() if found is None})
    by_hand = merged_by_hand(kind, a, b)
    for name, module in modules_of(by_hand).items():
        assert equal(modules_of(loaded)[name].state_dict(), module.state_dict())
    made = image(kind, loaded)
    assert torch.equal(made, image(kind, by_hand))
    assert not torch.equal(made, image(kind, a))


def test_a_result_is_the_same_in_whichever_layout_the_inputs_are(
    two: tuple[Any, Path, Any, Any], tmp_path: Path
) -> None:
    kind, folder, _, _ = two
    pairs = [("a", "b"), ("a.safetensors", "b"), ("a", "b.safetensors")]
    made = []
    for number, (a, b) in enumerate(pairs):
        recipe = mix(kind, folder / a, folder / b)
        path = rm.merge(recipe, tmp_path / f"there-{number}", dialect="diffusers", like=folder / "a")
        single = rm.merge(recipe, tmp_path / f"{number}.safetensors", dialect="original")
        made.append((tensors_in(path), load_file(single)))
    assert all(equal(made[0][0], there) and equal(made[0][1], single) for there, single in made[1:])
    names = [
        sorted(path.relative_to(at) for path in at.rglob("*.json")) for at in (folder / "a", *tmp_path.glob("there-*"))
    ]
    assert len(names) == 4 and all(one == names[0] and len(one) > 3 for one in names)


def test_there_and_back_the_tensors_are_the_same_bits(two: tuple[Any, Path, Any, Any], tmp_path: Path) -> None:
    _, folder, _, _ = two
    rm.convert(folder / "a.safetensors", tmp_path / "there", to="diffusers", like=folder / "a")
    assert equal(tensors_in(tmp_path / "there"), tensors_in(folder / "a"))
    again = rm.convert(tmp_path / "there", tmp_path / "again.safetensors", to="original")
    assert equal(load_file(again), load_file(folder / "a.safetensors"))


def test_a_denoiser_alone_is_merged_in_the_other_layout(two: tuple[Any, Path, Any, Any], tmp_path: Path) -> None:
    kind, folder, a, b = two
    (name,) = kind.places
    start = "model.diffusion_model."
    single = {key: tensor for key, tensor in load_file(folder / "b.safetensors").items() if key.startswith(start)}
    bare = {key.removeprefix(start): tensor for key, tensor in single.items()}
    merged = rm.merge(mix(kind, folder / "a" / name, bare))
    expected = modules_of(merged_by_hand(kind, a, b))[name].state_dict()
    assert equal(merged, expected)


# On the command line.

Remelt = Callable[..., tuple[int, str, str]]


@pytest.fixture
def remelt(capsys: pytest.CaptureFixture[str]) -> Remelt:
    """Run a command line; its exit code, what it printed, and what it said beside."""

    def call(*words: object) -> tuple[int, str, str]:
        code = run([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def here(tmp_path: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small model of SD1, ``sd1.safetensors``, and one of no known arch."""
    drawn = torch.Generator().manual_seed(0)
    write_model(
        tmp_path / "sd1", {key: torch.randn(i.shape, generator=drawn).half() for key, i in sd1_shapes(32).items()}
    )
    write_model(tmp_path / "strange", {"layers.0.weight": torch.zeros(2), "layers.1.weight": torch.zeros(2)})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REMELT_CONFIG", str(tmp_path / "none.toml"))
    monkeypatch.delenv("REMELT_MODELS_DIR", raising=False)
    return tmp_path


def test_the_command_converts_there_and_back(two: tuple[Any, Path, Any, Any], remelt: Remelt, tmp_path: Path) -> None:
    _, folder, _, _ = two
    there, single = tmp_path / "there", tmp_path / "single.safetensors"
    code, out, err = remelt("convert", folder / "a", "--to", "original", "-o", single)
    assert (code, err) == (0, "") and f"wrote {single} in " in out
    code, out, _ = remelt("convert", single, "--to", "diffusers", "--like", folder / "a", "-o", there, "--json")
    assert code == 0 and json.loads(out)["output"] == str(there)
    assert equal(tensors_in(there), tensors_in(folder / "a"))
    assert (there / "model_index.json").read_bytes() == (folder / "a" / "model_index.json").read_bytes()
    again = tmp_path / "again.safetensors"
    assert remelt("convert", there, "--to", "original", "-o", again, "-q") == (0, "", "")
    assert equal(load_file(again), load_file(single))


def test_a_conversion_takes_the_memory_that_it_is_given(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    drawn = torch.Generator().manual_seed(0)
    shapes = {key: i.shape for key, i in flux_shapes(16).items() if key.startswith("model.") or "shared" in key}
    path = write_model(tmp_path / "flux", {key: torch.randn(size, generator=drawn) for key, size in shapes.items()})
    memory = 2**24
    assert path.stat().st_size > 3 * memory
    recipe = rm.model(path)
    assert rm.plan(recipe, tmp_path / "there", dialect="diffusers", memory=memory).peak_memory <= memory
    there = rm.convert(path, tmp_path / "there", to="diffusers", memory=memory)
    (there / "model_index.json").write_text("{}")
    assert rm.plan(rm.model(there), tmp_path / "x.safetensors", dialect="original", memory=memory).peak_memory <= memory
    back = rm.convert(there, tmp_path / "back.safetensors", to="original", memory=memory)
    assert equal(load_file(back), load_file(path))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (
            ("sd1", "--to", "difusers", "-o", "there"),
            2,
            ("sd1 has no dialect named 'difusers'", "did you mean 'diffusers'?"),
        ),
        (
            ("sd1", "--to", "comfy", "-o", "there"),
            2,
            ("sd1 has no dialect named 'comfy'", "those of sd1: original, diffusers, kohya"),
        ),
        (
            ("sd1", "--to", "diffusers", "-o", "there.safetensors"),
            2,
            ("a model in diffusers's layout is a folder, but the output is the file there.safetensors", "-o there/"),
        ),
        (
            ("strange", "--to", "diffusers", "-o", "there"),
            3,
            ("strange.safetensors", "is of no known arch, so that nobody can tell how diffusers names its keys"),
        ),
        (("sd1", "--to", "original", "-o", "sd1.safetensors"), 3, ("sd1.safetensors exists", "--overwrite")),
        (
            ("sd1", "--to", "diffusers", "-o", "there", "--like", "nowhere"),
            3,
            ("nowhere cannot be read: No such file or directory",),
        ),
    ],
)
def test_a_conversion_that_cannot_be_is_refused(
    here: Path, remelt: Remelt, words: tuple[str, ...], code: int, said: tuple[str, ...]
) -> None:
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    found, out, err = remelt("convert", *words)
    assert (found, out) == (code, "")
    assert all(one in err for one in said)
    assert "Traceback" not in err
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before


def test_an_arch_that_is_ambiguous_may_be_stated(here: Path, remelt: Remelt) -> None:
    sd1 = {key: torch.randn(info.shape) for key, info in sd1_shapes(32).items()}
    flux = {key: torch.randn(info.shape) for key, info in flux_shapes(32).items() if key.startswith("model.")}
    save_file(sd1 | flux, "both.safetensors")
    code, _, err = remelt("convert", "both", "--to", "diffusers", "-o", "there")
    assert code == 3
    assert err.count("it looks like flux and like sd1 at once") == 1
    assert 'state which it is: model(..., arch="flux" or arch="sd1"), or convert --arch' in err
    assert remelt("convert", "both", "--to", "original", "--arch", "flux", "-o", "flux.safetensors", "-q")[0] == 0
    code, _, err = remelt("convert", "both", "--to", "diffusers", "--arch", "sd1", "-o", "there")
    assert code == 3 and "are of no part that is known of the original layout of sd1" in err
    assert remelt("convert", "sd1", "--to", "diffusers", "--arch", "sd1", "-o", "there", "-q")[0] == 0
    code, _, err = remelt("convert", "sd1", "--to", "diffusers", "--arch", "sdlx", "-o", "other")
    assert code == 3 and "no arch is named 'sdlx'" in err
    code, _, err = remelt("merge", "both", "sd1", "-m", "weighted_sum", "-o", "mixed.safetensors")
    assert code == 3 and "state which it is" in err


def test_archs_that_are_mixed_are_told_once_each(here: Path, remelt: Remelt) -> None:
    save_file({key: torch.randn(info.shape) for key, info in flux_shapes(64).items()}, "flux.safetensors")
    code, _, err = remelt("merge", "sd1", "flux", "-m", "weighted_sum", "-o", "mixed.safetensors")
    assert code == 3
    assert "sd1.safetensors  is sd1: model.diffusion_model.input_blocks.0.0.weight is [10, 4, 3, 3]; " in err
    assert "flux.safetensors  is flux: model.diffusion_model.img_in.weight is [48, 64]; " in err
    with pytest.raises(CheckError, match=r"is stated to be flux, but looks like sd1: model\.diffusion_model\.input"):
        rm.plan(rm.weighted_sum(rm.model("sd1.safetensors", arch="flux"), "flux.safetensors"))


def test_a_folder_that_exists_is_refused_and_may_be_replaced(here: Path, remelt: Remelt) -> None:
    assert remelt("convert", "sd1", "--to", "diffusers", "-o", "there", "-q")[0] == 0
    code, _, err = remelt("convert", "sd1", "--to", "diffusers", "-o", "there")
    assert code == 3 and "there exists" in err and "--overwrite" in err
    assert remelt("convert", "sd1", "--to", "diffusers", "-o", "there", "--overwrite", "-q")[0] == 0


def test_a_part_in_diffusers_names_meets_a_whole_original(
    tmp_path: Path, write_sd1_models: Callable[..., None]
) -> None:
    write_sd1_models(tmp_path, ("a", "b"))
    parts = rm.convert(tmp_path / "a.safetensors", tmp_path / "folder", to="diffusers")
    bare = parts / "unet" / "diffusion_pytorch_model.safetensors"
    found = rm.merge(rm.weighted_sum(bare, tmp_path / "b.safetensors", alpha=0.25), missing="skip")
    assert found.keys() == load_file(bare).keys()
    whole = rm.merge(rm.weighted_sum(tmp_path / "a.safetensors", tmp_path / "b.safetensors", alpha=0.25))
    assert torch.equal(found["conv_in.weight"], whole["model.diffusion_model.input_blocks.0.0.weight"])
    with pytest.raises(CheckError, match="lacks"):
        rm.plan(rm.weighted_sum(bare, tmp_path / "b.safetensors"))


def test_what_a_layout_has_no_place_for_comes_from_the_first(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    drawn = torch.Generator().manual_seed(0)
    shapes = sdxl_shapes(64).items()
    models = [
        write_model(tmp_path / name, {key: torch.randn(info.shape, generator=drawn) for key, info in shapes})
        for name in "ab"
    ]
    folder = rm.convert(models[1], tmp_path / "folder", to="diffusers")
    found = rm.merge(rm.weighted_sum(models[0], folder, alpha=0.5))
    scale = "conditioner.embedders.1.model.logit_scale"
    assert torch.equal(found.pop(scale), load_file(models[0])[scale])
    whole = rm.merge(rm.weighted_sum(*models, alpha=0.5))
    assert all(torch.equal(whole[key], value) for key, value in found.items())
    plan = rm.plan(rm.weighted_sum(models[0], folder, alpha=0.5))
    assert any("folder lacks 1 key" in warning and "taken from a" in warning for warning in plan.warnings)


def test_a_single_file_is_converted_to_kohyas_names_and_back(here: Path, remelt: Remelt) -> None:
    tensors = {key: torch.randn(info.shape).half() for key, info in sd1_shapes(32).items()}
    save_file(tensors, "sd1.safetensors")
    assert remelt("convert", "sd1", "--to", "kohya", "-o", "there.safetensors", "-q")[0] == 0
    there = load_file("there.safetensors")
    assert {"unet.conv_in.weight", "te.text_model.final_layer_norm.bias"} <= there.keys()
    assert remelt("convert", "there", "--to", "original", "-o", "back.safetensors", "-q")[0] == 0
    back = load_file("back.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())
    assert remelt("merge", "there", "sd1", "-m", "weighted_sum", "-o", "mix.safetensors", "-q")[0] == 0
    assert load_file("mix.safetensors").keys() == there.keys()  # the first model's layout is one of single files, too
    assert remelt("convert", "sd1", "--to", "diffusers", "-o", "x.safetensors")[0] == 2


def test_two_layouts_in_one_file_are_refused_with_the_keys(here: Path, remelt: Remelt) -> None:
    tensors = {key: torch.randn(info.shape) for key, info in sd1_shapes(32).items()}
    save_file(tensors, "sd1.safetensors")
    assert remelt("convert", "sd1", "--to", "kohya", "-o", "kohya.safetensors", "-q")[0] == 0
    text = {key: tensor for key, tensor in load_file("kohya.safetensors").items() if key.startswith("te.")}
    save_file({**{key: one for key, one in tensors.items() if "cond_stage" not in key}, **text}, "mixed.safetensors")
    code, _, err = remelt("convert", "mixed", "--to", "original", "-o", "out.safetensors")
    assert code == 3
    assert "mixed.safetensors  is of the layout original, but some of its keys are of kohya: te.text_model" in err


def test_what_is_left_out_is_told_and_what_stands_beside_a_pipeline_is(here: Path, remelt: Remelt) -> None:
    tensors = {key: torch.randn(info.shape) for key, info in sd1_shapes(32).items()}
    save_file({**tensors, "v_pred": torch.empty(0)}, "sd1.safetensors")
    code, _, err = remelt("convert", "sd1", "--to", "diffusers", "-o", "there")
    assert code == 0
    assert "1 key without a place in the layout of the result: v_pred" in err
    (here / "there" / "safety_checker").mkdir()
    save_file({"concept_embeds": torch.ones(2, 2)}, here / "there" / "safety_checker" / "model.safetensors")
    code, _, err = remelt("convert", "there", "--to", "original", "-o", "back.safetensors")
    assert code == 0
    assert "safety_checker/concept_embeds" in err
    assert remelt("merge", "there", "sd1", "-m", "weighted_sum", "-o", "mix", "--dialect", "diffusers")[0] == 0
    assert (here / "mix" / "safety_checker" / "model.safetensors").exists()
