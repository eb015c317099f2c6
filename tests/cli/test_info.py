"""`remelt info ARCH`: what is known of an arch, in short and in full."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from remelt.archs.arch import all_archs
from remelt.archs.shapes import shapes_of
from remelt.cli.main import run

Remelt = Callable[..., tuple[int, str, str]]


@pytest.fixture
def remelt(capsys: pytest.CaptureFixture[str]) -> Remelt:
    def call(*words: str) -> tuple[int, str, str]:
        code = run(list(words))
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_info_of_an_arch_is_short_unless_all_of_it_is_asked_for(remelt: Remelt) -> None:
    _, short, _ = remelt("info", "sd1")
    code, out, _ = remelt("info", "sd1", "-v")
    assert code == 0
    assert len(short.splitlines()) < 150
    assert "IN01 .. IN02          36 keys each\n" in short
    for line in (
        "txt        196 keys  also clip_l, text_encoder, te   begins with cond_stage_model.",
        "ema        0 keys    also model_ema                  begins with model_ema.",
        "BASE  444 keys",
        "diffusers  txt in text_encoder/, unet in unet/, vae in vae/",
        "attn1.to_q",
        "inpainting        this is an inpainting model (9 input channels): a plain model's first convolution",
    ):
        assert f"  {line}" in short, line
        assert f"  {line}" in out, line
    lines = {" ".join(line.split()) for line in out.splitlines()}
    for line in (
        "IN01 .. IN02: 36 keys each, also in1, input_blocks.1, model.diffusion_model.input_blocks.1",
        "  model.diffusion_model.input_blocks.{i}.0.in_layers.{0,2}.{bias,weight}",
        "model.diffusion_model.input_blocks.0.0.weight [~320, 4..9, 3, 3]",
        "*alphas_cumprod*",
        "*position_ids",
        "unet  input_blocks., middle_block., output_blocks., time_embed., label_emb., out.",
        "cond_stage_model.transformer.encoder.           for cond_stage_model.transformer.text_model.encoder.",
        "model_ema. and what follows model. or model.diffusion_model., without dots",
        "input_blocks.{3*b+l+1}.0.<resnet>      is down_blocks.{b}.resnets.{l}.<resnet>",
        "<attention>q.                        is <attention>kernel(to_q.|query.)",
        "architecture    stable-diffusion-v1",
    ):
        assert " ".join(line.split()) in lines, line


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("llama", ["one tensor under several names\n  lm_head.weight, model.embed_tokens.weight\n",
                   "near miss mixtral by all of (this is a Mixtral"]),
        ("sdxl", ["left out of txt2 in diffusers\n  model.logit_scale\n  model.attn_mask\n",
                  "recognised by all of (~ at full size)\n", "  no model.diffusion_model.input_blocks.9.0.op.weight"]),
        ("flux", ["transformer_blocks.{i}.attn.to_q. + transformer_blocks.{i}.attn.to_k. + ",
                  "the variant fill by all of\n  model.diffusion_model.img_in.weight [*, 384]\n"]),
        ("qwen2", ["  model.visual.merger.                for visual.merger.\n"]),
    ],
)  # fmt: skip
def test_info_tells_all_of_an_arch(remelt: Remelt, name: str, lines: list[str]) -> None:
    code, out, _ = remelt("info", name, "-v")
    assert code == 0
    for line in lines:
        assert line in out, line


@pytest.mark.parametrize("name", all_archs())
def test_info_as_json_has_every_key_of_an_arch_in_one_block(remelt: Remelt, name: str) -> None:
    code, out, _ = remelt("info", name, "--json")
    told = json.loads(out)
    assert code == 0
    held = [key for keys in told["blocks"].values() for key in keys]
    assert sorted(held) == sorted(shapes_of(name) or ())
    assert [block for alike in told["block_runs"] for block in alike["blocks"]] == list(told["blocks"])
    for alike in told["block_runs"]:
        assert all(len(told["blocks"][block]) == len(alike["keys"]) for block in alike["blocks"])
    # A full listing is told without a fault, and in few lines of what is many keys.
    _, out, _ = remelt("info", name, "-v")
    assert len(out.splitlines()) < 700
