"""Results in few bits: stored as their readers expect, near what they stand for, and telling what is lost between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import remelt as rm
from remelt.api.merging import Merged, prepare_merges, run_prepared
from remelt.api.options import MergeOptions
from remelt.api.recipes import load_recipe
from remelt.api.verification import verify
from remelt.errors import OptionError

F8 = torch.float8_e4m3fn


def model(seed: int, width: int = 64, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"img_in.weight": (width, 16), "final_layer.linear.weight": (16, width)}
    for block in range(2):
        shapes |= {
            f"double_blocks.{block}.attn.qkv.weight": (3 * width, width),
            f"double_blocks.{block}.attn.qkv.bias": (3 * width,),
            f"double_blocks.{block}.norm.weight": (width,),
            f"double_blocks.{block}.mlp.0.weight": (width, 2 * width),
        }
    return {key: (0.02 * torch.randn(shape, generator=generator)).to(dtype) for key, shape in shapes.items()}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for seed, name in enumerate("ab"):
        save_file(model(seed), tmp_path / f"{name}.safetensors")
    return [tmp_path / f"{name}.safetensors" for name in "ab"]


def told(recipe: Any, **options: Any) -> list[str]:
    """What a merge in memory says of its results."""
    chosen = MergeOptions(**options)
    with prepare_merges([load_recipe(recipe)], [None], chosen) as prepared:
        (*_, merged) = run_prepared(prepared, chosen)
    assert isinstance(merged, Merged)
    return merged.nonfinite


def test_linear_layers_are_scaled_as_comfyui_reads_them(files: list[Path], tmp_path: Path) -> None:
    recipe = rm.weighted_sum(*files, alpha=0.3)
    due = rm.merge(recipe, dtype="fp32")
    out = rm.merge(recipe, tmp_path / "out.safetensors", dtype="fp8_e4m3fn", scaled=True)
    stored = load_file(out)
    small = {key for key in due if ".qkv.weight" in key or ".mlp.0.weight" in key}
    scales = {key.replace("weight", "scale_weight") for key in small}
    assert set(stored) == {*due, *scales, "scaled_fp8"}
    assert {key for key, tensor in stored.items() if tensor.dtype is F8} == {*small, "scaled_fp8"}
    assert all(stored[key].dtype is torch.bfloat16 for key in due if key not in small)
    for key in small:
        scale = stored[key.replace("weight", "scale_weight")]
        assert scale.shape == (1,)
        assert float(scale) == pytest.approx(float(due[key].abs().max()) / 448.0)
        assert torch.equal(stored[key].float(), (due[key] / scale).clamp(-448, 448).to(F8).float())
        found = stored[key].float() * scale
        assert float((found - due[key]).abs().max()) <= 2**-4 * float(due[key].abs().max())
        again = rm.merge(rm.model(out), dtype="fp32")[key]
        assert torch.equal(again, found)


def test_a_scaled_result_is_verified_with_its_recipe(files: list[Path], tmp_path: Path) -> None:
    out = rm.merge(rm.weighted_sum(*files), tmp_path / "out.safetensors", dtype="fp8_e4m3fn", scaled=True)
    found = verify(out, recipe=True, sample=None)
    assert (found.checksum, found.faults, found.recomputed) == (True, [], len(load_file(out)))


def test_a_language_model_is_scaled_in_blocks_as_transformers_reads_them(tmp_path: Path) -> None:
    quantizer = pytest.importorskip("transformers.integrations.finegrained_fp8")
    (tmp_path / "a").mkdir()
    tensors = {"model.embed_tokens.weight": torch.randn(64, 256)}
    for layer in range(2):
        tensors |= {
            f"model.layers.{layer}.up.weight": torch.randn(384, 256),
            f"model.layers.{layer}.odd.weight": torch.randn(100, 256),
        }
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 256}))
    out = rm.merge(rm.model(tmp_path / "a") * 1.0, f"{tmp_path}/out/", dtype="fp8_e4m3fn", scaled=True)
    stored = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    assert config["hidden_size"] == 256
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert "model.layers.0.odd" in config["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.0.up" not in config["quantization_config"]["modules_to_not_convert"]
    for layer in range(2):
        key = f"model.layers.{layer}.up.weight"
        assert stored[f"{key}_scale_inv"].shape == (3, 2)
        found = quantizer.Fp8Dequantize(None)._dequantize_one(stored[key], stored[f"{key}_scale_inv"], torch.float32)
        assert float((found - tensors[key]).abs().max()) <= 2**-4 * float(tensors[key].abs().max())
        assert stored[f"model.layers.{layer}.odd.weight"].dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_of_scaled_files_is_that_of_their_dequantised_copies(tmp_path: Path, dtype: torch.dtype) -> None:
    files, copies = [], []
    for seed, name in enumerate("ab"):
        path = rm.merge(rm.model(model(seed)), tmp_path / f"{name}.safetensors", dtype="fp8_e4m3fn", scaled=True)
        stored = load_file(path)
        files.append(path)
        scale = {key: stored.get(key.replace("weight", "scale_weight"), torch.ones(1)) for key in model(seed)}
        copies.append(
            rm.model(
                {
                    key: stored[key].float() * scale[key].float() if stored[key].dtype is F8 else stored[key]
                    for key in scale
                }
            )
        )
    wanted = str(dtype).removeprefix("torch.")
    found = rm.merge(rm.weighted_sum(*files, alpha=0.3), dtype=wanted)
    due = rm.merge(rm.weighted_sum(*copies, alpha=0.3), dtype=wanted)
    assert set(found) == set(due)
    assert all(torch.equal(found[key], due[key]) for key in due)


def test_results_of_scaled_files_are_bfloat16_unless_asked_otherwise(files: list[Path], tmp_path: Path) -> None:
    scaled = rm.merge(rm.model(files[0]), tmp_path / "s.safetensors", dtype="fp8_e4m3fn", scaled=True)
    found = rm.merge(rm.weighted_sum(scaled, files[1]))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert not any("scale" in key for key in found)


@pytest.mark.parametrize("style", ["comfyui", "rows", "blocks", "bitsandbytes"])
def test_the_first_models_quantisation_is_kept_where_asked(tmp_path: Path, style: str) -> None:
    weights = {f"layers.{block}.up.weight": torch.randn(64, 32) for block in range(2)}
    tensors: dict[str, Tensor] = {"norm.weight": torch.randn(32)}
    for key, weight in weights.items():
        stem = key.removesuffix("weight")
        if style == "comfyui":
            tensors |= {
                key: (weight * 50).to(F8),
                f"{stem}scale_weight": torch.tensor([0.02]),
                f"{stem}scale_input": torch.tensor([1.5]),
            }
            tensors["scaled_fp8"] = torch.zeros(2, dtype=F8)
        elif style == "rows":
            tensors |= {
                key: (weight * 50).to(F8),
                f"{stem}weight_scale": torch.full((64, 1), 0.02, dtype=torch.bfloat16),
            }
        elif style == "blocks":
            tensors |= {key: (weight * 50).to(F8), f"{key}_scale_inv": torch.full((4, 2), 0.02)}
        else:
            tensors |= {
                key: (weight * 20).round().clamp(-127, 127).to(torch.int8),
                f"{stem}SCB": torch.full((64,), 6.35),
            }
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({**weights, "norm.weight": tensors["norm.weight"]}, tmp_path / "wide.safetensors")
    recipe = rm.weighted_sum(tmp_path / "a.safetensors", tmp_path / "wide.safetensors", alpha=0.5)
    due = rm.merge(recipe, dtype="fp32")
    out = rm.merge(recipe, tmp_path / "b.safetensors", keep_quantisation=True)
    stored = load_file(out)
    assert {key: (tensor.dtype, tensor.shape) for key, tensor in stored.items()} == {
        key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()
    }
    if style == "comfyui":
        assert float(stored["layers.0.up.scale_input"]) == 1.5
    found = rm.merge(rm.model(out), dtype="fp32")
    for key in weights:
        assert float((found[key] - due[key]).abs().max()) <= 2**-4 * float(due[key].abs().max())
    assert verify(out, recipe=True, sample=None).faults == []


def test_experts_of_gpt_oss_keep_their_format(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 130, (3, 10, 4), dtype=torch.uint8, generator=generator)
    save_file(
        {"m.up_blocks": blocks, "m.up_scales": scales, "m.up_bias": torch.randn(3, 10)}, tmp_path / "a.safetensors"
    )
    out = rm.merge(rm.model(tmp_path / "a.safetensors") * 1.0, tmp_path / "b.safetensors", keep_quantisation=True)
    before, after = (rm.merge(rm.model(path), dtype="fp32") for path in (tmp_path / "a.safetensors", out))
    assert {key: str(tensor.dtype) for key, tensor in load_file(out).items()} == {
        "m.up_blocks": "torch.uint8",
        "m.up_scales": "torch.uint8",
        "m.up_bias": "torch.float32",
    }
    assert all(torch.equal(before[key], after[key]) for key in before)
    half = rm.merge(
        0.7 * rm.model(tmp_path / "a.safetensors") + 0.3 * rm.model(out),
        tmp_path / "c.safetensors",
        keep_quantisation=True,
    )
    again = rm.merge(rm.model(half), dtype="fp32")
    largest = before["m.up"].transpose(1, 2).reshape(3, 10, 4, 32).abs().amax(-1, keepdim=True)
    apart = (again["m.up"] - before["m.up"]).transpose(1, 2).reshape(3, 10, 4, 32).abs()
    assert bool((apart <= largest / 4.0).all())


@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_of_bitsandbytes_are_read_by_it_again(tmp_path: Path, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(24, 33, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=nested)
    beside = {f"a.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    save_file({"a.weight": codes, **beside}, tmp_path / "a.safetensors")
    out = rm.merge(rm.model(tmp_path / "a.safetensors") * 1.0, tmp_path / "b.safetensors", keep_quantisation=True)
    stored = load_file(out)
    parts = {key.removeprefix("a.weight."): tensor for key, tensor in stored.items() if key != "a.weight"}
    again = functional.dequantize_4bit(stored["a.weight"], functional.QuantState.from_dict(parts, device="cpu"))
    due = functional.dequantize_4bit(codes, state)
    assert torch.equal(stored["a.weight"], codes)
    torch.testing.assert_close(again.float(), due.float(), atol=0.0, rtol=2**-7)


@pytest.mark.parametrize("options", [{"scaled": True}, {}], ids=["scaled", "cast"])
@pytest.mark.parametrize("executor", ["native", "torch"])
def test_what_falls_between_two_numbers_is_told(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], executor: str
) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    base = {key: tensor.float() for key, tensor in model(0).items()}
    moved = {
        key: tensor * 1.001 if "mlp" in key else tensor * 1.5 if "qkv.weight" in key else tensor
        for key, tensor in base.items()
    }
    recipe = rm.weighted_sum(rm.model(base), rm.model(moved), alpha=0.5)
    (line,) = told(recipe, dtype="fp8_e4m3fn", **options)
    assert line.startswith("result: most of what the merge changes is less than half a step of the numbers stored")
    assert "in 2 tensors: double_blocks.0.mlp.0.weight (100%), double_blocks.1.mlp.0.weight (100%)" in line
    assert "--dtype bf16 keeps it" in line
    assert told(recipe, dtype="bf16") == []
    assert told(rm.weighted_sum(rm.model(base), rm.model(moved), alpha=0.0), dtype="fp8_e4m3fn", **options) == []


def test_a_zero_tensor_and_the_largest_numbers_are_scaled(tmp_path: Path) -> None:
    tensors = {f"layers.{n}.up.weight": torch.full((8, 8), value) for n, value in enumerate((0.0, 3e38))}
    stored = rm.merge(rm.model(tensors) * 1.0, dtype="fp8_e4m3fn", scaled=True)
    assert float(stored["layers.0.up.scale_weight"]) == 1.0
    assert torch.equal(stored["layers.0.up.weight"].float(), torch.zeros(8, 8))
    assert float(stored["layers.1.up.weight"].float().max()) == 448.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaled": True}, "scales go with numbers of eight bits, but dtype is None"),
        ({"scaled": True, "dtype": "bf16"}, "scales go with numbers of eight bits, but dtype is 'bf16'"),
        ({"scaled": True, "dtype": "fp8", "keep_quantisation": True}, "scaled anew, or keeps .* but not both"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MergeOptions(**options)


def test_what_cannot_be_kept_or_scaled_is_refused(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"a\.safetensors is not quantised in this layout"):
        rm.merge(rm.weighted_sum(*files), keep_quantisation=True)
    with pytest.raises(OptionError, match="scales of fp8 are no part of diffusers' folders of components"):
        rm.merge(rm.model({"unet/blocks.0.a.weight": torch.ones(4, 4)}) * 1.0, dtype="fp8", scaled=True)
    with pytest.raises(OptionError, match="it has no linear layers in blocks"):
        rm.merge(rm.model({"a": torch.zeros(3)}) * 1.0, dtype="fp8", scaled=True)
    packed = {
        "a.weight": torch.ones(4, 32, dtype=torch.uint8),
        "a.weight_scale": torch.ones(4, 4).to(F8),
        "a.weight_scale_2": torch.tensor(1.0),
    }
    save_file(packed, tmp_path / "n.safetensors")
    with pytest.raises(OptionError, match=r"a\.weight of n\.safetensors is nvfp4, which is read and not written"):
        rm.merge(rm.model(tmp_path / "n.safetensors") * 1.0, keep_quantisation=True)


def test_a_plan_counts_the_bytes_that_files_have(tmp_path: Path) -> None:
    path = rm.merge(rm.model(model(0, width=256)), tmp_path / "a.safetensors", dtype="fp8_e4m3fn", scaled=True)
    planned = rm.plan(rm.model(path) * 1.0, tmp_path / "b.safetensors")
    size = sum(tensor.nbytes for tensor in load_file(path).values())
    assert size - 16 <= planned.bytes_read <= size
    assert planned.inputs[0].size == planned.bytes_read
    assert planned.bytes_written > 1.5 * size  # BF16


def test_a_scaled_file_is_merged_again_with_its_options_or_with_others(files: list[Path], tmp_path: Path) -> None:
    out = rm.merge(rm.weighted_sum(*files), tmp_path / "out.safetensors", dtype="fp8", scaled=True)
    again = rm.merge(out)
    assert {key: (tensor.dtype, tensor.shape) for key, tensor in again.items()} == {
        key: (tensor.dtype, tensor.shape) for key, tensor in load_file(out).items()
    }
    assert {tensor.dtype for tensor in rm.merge(out, dtype="fp16").values()} == {torch.float16}


def test_inspect_tells_how_tensors_are_quantised(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from remelt.cli.main import run

    rm.merge(rm.model(files[0]), tmp_path / "s.safetensors", dtype="fp8", scaled=True)
    assert run(["inspect", str(tmp_path / "s.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "quantised   4 F8_E4M3 with a scale\n" in shown
    assert "scale_weight" not in shown.partition("recipe")[0]
    pytest.importorskip("gguf")
    rm.merge(rm.model(files[0]), tmp_path / "g.gguf", dtype="q8_0")
    assert run(["inspect", str(tmp_path / "g")]) == 0  # by its name alone
    assert "quantised   5 Q8_0\n" in capsys.readouterr().out


def test_of_a_checkpoint_the_diffusion_model_is_scaled(tmp_path: Path) -> None:
    parts = ("model.diffusion_model.double_blocks", "text_encoders.clip_l.layers")
    tensors = {f"{part}.{block}.up.weight": torch.randn(16, 8) for part in parts for block in range(2)}
    stored = rm.merge(rm.model(tensors) * 1.0, dtype="fp8", scaled=True)
    small = {key for key, tensor in stored.items() if tensor.dtype is F8}
    assert small == {"model.diffusion_model.scaled_fp8", *(key for key in tensors if key.startswith("model."))}
    assert not any(key.startswith("text_encoders") and "scale" in key for key in stored)


def test_gguf_files_have_no_shards(files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(OptionError, match="a GGUF file is written whole"):
        rm.merge(rm.model(files[0]) * 1.0, tmp_path / "a.gguf", max_shard_size="1KiB")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("dtype", [None, "fp32", "fp16"])
def test_a_configuration_tells_the_type_of_what_is_dequantised(tmp_path: Path, dtype: str | None) -> None:
    (tmp_path / "a").mkdir()
    tensors = {f"model.layers.{layer}.up.weight": torch.randn(128, 128) for layer in range(2)}
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float16"}))
    small = rm.merge(rm.model(tmp_path / "a") * 1.0, f"{tmp_path}/small/", dtype="fp8", scaled=True)
    out = rm.merge(rm.model(small) * 1.0, f"{tmp_path}/out/", dtype=dtype)
    (stored,) = {str(tensor.dtype).removeprefix("torch.") for tensor in load_file(out / "model.safetensors").values()}
    assert json.loads((out / "config.json").read_text()) == {"model_type": "llama", "dtype": stored}


def test_one_model_is_stored_otherwise_on_the_command_line(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from remelt.cli.main import run

    monkeypatch.chdir(tmp_path)
    assert run(["merge", "a.safetensors", "--dtype", "fp8_e4m3fn", "--scaled", "-o", "s.safetensors", "-q"]) == 0
    assert "scaled_fp8" in load_file("s.safetensors")
    assert run(["merge", "a", "--dtype", "fp16", "-o", "half", "-q"]) == 0
    assert {tensor.dtype for tensor in load_file("half.safetensors").values()} == {torch.float16}
    assert run(["plan", "a", "--max-shard-size", "50KB", "-o", "shards"]) == 0
    assert run(["merge", "half.safetensors", "--dtype", "fp32", "-o", "again", "-q"]) == 0  # the recipe inside
    capsys.readouterr()
    assert run(["merge", "a.safetensors", "-o", "same"]) != 0
    assert "a.safetensors carries no recipe" in capsys.readouterr().err
    assert run(["merge", "a", "--dtype", "q4_k", "-o", "x.gguf"]) != 0
    assert "q4_k is a type of GGUF files that is read, and not written" in capsys.readouterr().err
