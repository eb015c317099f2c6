"""Quantised tensors are read as the numbers that the tools that wrote them mean, bit for bit, and oddities refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError
from remelt.formats.checkpoint import Checkpoint, open_checkpoint
from remelt.formats.memory import MemoryCheckpoint
from remelt.formats.quantised import dequantised
from remelt.formats.quantised.codes import float8_table

F8 = torch.float8_e4m3fn


def opened(path: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / "model.safetensors")
    return dequantised(open_checkpoint(path / "model.safetensors"))


def whole(checkpoint: Checkpoint, key: str) -> Tensor:
    info = checkpoint.tensors[key]
    assert info.dtype is DType.F32
    assert info.written is DType.BF16
    found = torch.frombuffer(bytearray(checkpoint.read(key)), dtype=torch.float32)
    for begin, end in ((0, 4), (4, 24), (12, info.nbytes), (8, 8)):  # any part is that part of the whole
        part = (
            torch.frombuffer(bytearray(checkpoint.read(key, begin, end)), dtype=torch.float32) if begin < end else None
        )
        assert part is None or torch.equal(part, found[begin // 4 : end // 4])
    return found.reshape(info.shape)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [DType.F8_E4M3, DType.F8_E5M2, DType.F8_E8M0], ids=str)
def test_the_tables_of_eight_bit_floats_are_those_of_torch(dtype: DType) -> None:
    from remelt.tensors import TORCH

    theirs = torch.arange(256, dtype=torch.uint8).view(TORCH[dtype]).float()
    ours = torch.from_numpy(float8_table(dtype).copy())
    assert torch.equal(theirs.nan_to_num(12345.0), ours.nan_to_num(12345.0))


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_scale_for_a_tensor(tmp_path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    stored, scale = drawn(24, 40).to(dtype), torch.tensor(0.0173)
    found = opened(tmp_path, {"a.weight": stored, f"a.{name}": scale.reshape(shape), "a.bias": drawn(24)})
    assert list(found.tensors) == ["a.bias", "a.weight"]
    assert torch.equal(whole(found, "a.weight"), stored.float() * scale)


def test_markers_and_scales_of_inputs_are_no_tensors(tmp_path: Path) -> None:
    marker = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    tensors = {
        "a.weight": drawn(8, 8).to(F8),
        "a.weight_scale": torch.tensor(2.0),
        "a.input_scale": torch.tensor(1.0),
        "a.comfy_quant": marker,
        "scaled_fp8": torch.zeros(2, dtype=F8),
    }
    assert list(opened(tmp_path, tensors).tensors) == ["a.weight"]


@pytest.mark.parametrize("shape", [(24,), (24, 1)], ids=str)
def test_a_scale_for_each_row(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stored, scale = drawn(24, 40).to(F8), drawn(24, seed=1).abs()
    found = opened(tmp_path, {"a.weight": stored, "a.weight_scale": scale.reshape(shape)})
    assert torch.equal(whole(found, "a.weight"), stored.float() * scale[:, None])


def test_integers_with_a_scale_for_each_row_are_those_of_bitsandbytes(tmp_path: Path) -> None:
    stored, largest = torch.randint(-127, 128, (6, 32), dtype=torch.int8), drawn(6).abs()
    found = opened(
        tmp_path, {"a.weight": stored, "a.SCB": largest, "a.weight_format": torch.zeros((), dtype=torch.uint8)}
    )
    assert list(found.tensors) == ["a.weight"]
    torch.testing.assert_close(whole(found, "a.weight"), stored.float() * largest[:, None] / 127.0)


def blocked(stored: Tensor, scale: Tensor) -> Tensor:
    quantizer = pytest.importorskip("transformers.integrations.finegrained_fp8")
    result: Tensor = quantizer.Fp8Dequantize(None)._dequantize_one(stored, scale, torch.float32)
    return result


@pytest.mark.parametrize(
    ("shape", "grid"), [((256, 384), (2, 3)), ((128, 128), (1, 1)), ((64, 96), (4, 3)), ((2, 64, 32), (2, 4, 2))]
)
def test_scales_for_blocks_are_those_of_transformers(
    tmp_path: Path, shape: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    stored, scale = drawn(*shape).to(F8), drawn(*grid, seed=1).abs()
    found = opened(tmp_path, {"a.weight": stored, "a.weight_scale_inv": scale})
    assert torch.equal(whole(found, "a.weight"), blocked(stored, scale))


def test_blocks_that_do_not_divide_the_shape(tmp_path: Path) -> None:
    stored, scale = drawn(300, 200).to(F8), drawn(3, 2, seed=1).abs()
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :200]
    found = opened(tmp_path, {"a.weight": stored, "a.weight_scale_inv": scale})
    assert torch.equal(whole(found, "a.weight"), stored.float() * spread)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"weight_block_size": [110, 190]}}))
    spread = scale.repeat_interleave(110, 0).repeat_interleave(190, 1)[:300, :200]
    assert torch.equal(
        whole(opened(tmp_path, {"a.weight": stored, "a.weight_scale_inv": scale}), "a.weight"), stored.float() * spread
    )


def test_experts_of_gpt_oss_are_those_of_transformers(tmp_path: Path) -> None:
    theirs = pytest.importorskip("transformers.integrations.mxfp4")._convert_moe_packed_tensors
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(90, 160, (3, 10, 4), dtype=torch.uint8, generator=generator)
    found = opened(
        tmp_path, {"m.experts.up_blocks": blocks, "m.experts.up_scales": scales, "m.experts.up_bias": drawn(3, 10)}
    )
    assert set(found.tensors) == {"m.experts.up", "m.experts.up_bias"}
    assert torch.equal(whole(found, "m.experts.up"), theirs(blocks, scales, dtype=torch.float32))


def test_large_experts_are_dequantised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from remelt.formats.quantised import checkpoint, schemes

    blocks, scales = torch.ones((2, 10, 4, 16), dtype=torch.uint8), torch.full((2, 10, 4), 127, dtype=torch.uint8)
    calls = []
    real = schemes.Packed.elements
    monkeypatch.setattr(schemes.Packed, "elements", lambda *args: (calls.append(args[-2:]), real(*args))[1])
    monkeypatch.setattr(checkpoint, "_WIDE", 64)
    found = opened(tmp_path, {"up_blocks": blocks, "up_scales": scales})
    for begin in range(0, 2 * 10 * 128 * 4, 640):
        assert len(found.read("up", begin, begin + 640)) == 640
    assert len(calls) <= 3


@pytest.mark.parametrize("scales", [torch.uint8, torch.float8_e8m0fnu], ids=str)
def test_rows_of_mxfp4(tmp_path: Path, scales: torch.dtype) -> None:
    values = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    packed = torch.randint(0, 256, (5, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    exponents = torch.tensor([[120, 130]] * 5, dtype=torch.uint8)
    found = opened(tmp_path, {"a.weight": packed, "a.weight_scale": exponents.view(scales)})
    for row in range(5):
        for column in range(64):
            code = int(packed[row, column // 2]) >> (4 * (column % 2)) & 15
            due = (-1) ** (code >> 3) * values[code & 7] * 2.0 ** (int(exponents[row, column // 32]) - 127)
            assert float(whole(found, "a.weight")[row, column]) == due


def test_rows_of_nvfp4(tmp_path: Path) -> None:
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    packed = torch.randint(0, 256, (6, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    scale, over = drawn(6, 3, seed=2).abs().to(F8), torch.tensor(0.03)
    codes = torch.stack((packed & 15, packed >> 4), 2).flatten(1).long()
    due = torch.where(codes > 7, -values[codes & 7], values[codes & 7]) * (scale.float() * over).repeat_interleave(
        16, 1
    )
    found = opened(tmp_path, {"a.weight": packed, "a.weight_scale": scale, "a.weight_scale_2": over})
    assert torch.equal(whole(found, "a.weight"), due)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64, 256), (3002,), (7, 33)], ids=str)
def test_four_bits_are_those_of_bitsandbytes(tmp_path: Path, kind: str, nested: bool, shape: tuple[int, ...]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    stored, state = functional.quantize_4bit(drawn(*shape), quant_type=kind, blocksize=64, compress_statistics=nested)
    beside = {f"a.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    found = opened(tmp_path, {"a.weight": stored, **beside, "a.bias": drawn(3)})
    assert set(found.tensors) == {"a.weight", "a.bias"}
    assert torch.equal(whole(found, "a.weight"), functional.dequantize_4bit(stored, state).reshape(shape))


def test_a_file_without_quantised_tensors_is_itself(tmp_path: Path) -> None:
    save_file(
        {"a.weight": drawn(4, 4).to(F8), "b.weight": drawn(4), "c.weight_scale": drawn(4)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(FormatError, match=r"c\.weight_scale is a scale of c\.weight, which is not there"):
        dequantised(open_checkpoint(tmp_path / "x.safetensors"))
    save_file(
        {"a.weight": drawn(4, 4).to(F8), "n.weight": drawn(4), "n.weight_scale": drawn(4)}, tmp_path / "x.safetensors"
    )
    with open_checkpoint(tmp_path / "x.safetensors") as plain:
        assert dequantised(plain) is plain


WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "a scale of another shape": (
        {"a.weight": drawn(8, 8).to(F8), "a.weight_scale": drawn(3)},
        r"a.weight_scale is \[3\], which does not fit a.weight of \[8, 8\]",
    ),
    "no scale in a marked file": (
        {"a.weight": drawn(8, 8).to(F8), "b.weight": drawn(8, 8).to(F8), "b.scale_weight": drawn(1),
         "scaled_fp8": drawn(0).to(F8)},
        "a.weight is F8_E4M3 .* without a.scale_weight, in a file that is marked scaled_fp8",
    ),
    "integers without a scale": ({"a.weight": torch.ones(4, 4, dtype=torch.int8)}, "a.weight is I8 .* without a scale"),
    "blocks without scales": ({"a_blocks": torch.ones(2, 4, 1, 16, dtype=torch.uint8)}, "a_blocks has no a_scales"),
    "blocks with others' scales": (
        {"a_blocks": torch.ones(2, 4, 1, 16, dtype=torch.uint8), "a_scales": torch.ones(2, 3, 1, dtype=torch.uint8)},
        r"a_scales is U8 \[2, 3, 1\], which does not fit",
    ),
    "GPTQ": ({"a.qweight": torch.ones(4, 4, dtype=torch.int32), "a.scales": drawn(4)}, "integers of GPTQ or AWQ"),
    "compressed tensors": ({"a.weight_packed": torch.ones(4, 4, dtype=torch.int32)}, "of compressed-tensors"),
    "a table alone": (
        {"a.weight": torch.ones(8, 1, dtype=torch.uint8), "a.weight.quant_state.bitsandbytes__nf4": torch.frombuffer(
            bytearray(json.dumps({"shape": [16], "blocksize": 64}).encode()), dtype=torch.uint8)},
        "a.weight lacks a.weight.absmax, a.weight.quant_map",
    ),
    "a state that is no JSON": (
        {"a.weight": torch.ones(8, 1, dtype=torch.uint8),
         "a.weight.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.uint8)},
        "tells no shape and block size",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        opened(tmp_path, tensors)


STATE = "a.weight.quant_state.bitsandbytes__nf4"
NAMES = ("a.weight", "a.weight_scale", "a.scale_weight", "a_blocks", "a_scales", "a.SCB", "scaled_fp8",
         "a.weight.absmax", "a.weight.quant_map", STATE, "a.weight_scale_2", "b")  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(NAMES),
        st.tuples(st.sampled_from(list(DType)), st.lists(st.integers(0, 4), max_size=4)),
        max_size=6,
    )
)
def test_whatever_a_header_says_is_read_or_refused(told: dict[str, Any]) -> None:
    infos = {key: TensorInfo(dtype, tuple(shape)) for key, (dtype, shape) in told.items()}
    held = MemoryCheckpoint({key: (info, memoryview(bytearray(info.nbytes))) for key, info in infos.items()})
    try:
        found = dequantised(held)
        for key, info in found.tensors.items():
            assert len(found.read(key)) == info.nbytes
    except FormatError:
        return


def test_a_scale_may_have_no_other_name(tmp_path: Path) -> None:
    stored, scale = drawn(256, 128).to(F8), torch.tensor([[2.0], [0.5]])
    tensors = {"a.weight": stored, "a.scale": scale.to(torch.float8_e8m0fnu), "norm.scale": drawn(8)}
    found = opened(tmp_path, tensors)
    assert sorted(found.tensors) == ["a.weight", "norm.scale"]
    assert torch.equal(whole(found, "a.weight"), stored.float() * scale.repeat_interleave(128, 0))


def test_a_marker_speaks_of_the_model_that_it_is_in(tmp_path: Path) -> None:
    tensors = {
        "model.diffusion_model.blocks.0.weight": drawn(8, 8).to(F8),
        "text_encoders.t5.scaled_fp8": torch.zeros(2, dtype=F8),
        "text_encoders.t5.block.0.weight": drawn(8, 8).to(F8),
        "text_encoders.t5.block.0.scale_weight": torch.ones(1),
    }
    found = opened(tmp_path, tensors)
    assert found.tensors["model.diffusion_model.blocks.0.weight"].dtype is DType.F8_E4M3
    assert found.tensors["text_encoders.t5.block.0.weight"].dtype is DType.F32
    del tensors["text_encoders.t5.block.0.scale_weight"]
    with pytest.raises(FormatError, match=r"in a file that is marked text_encoders\.t5\.scaled_fp8"):
        opened(tmp_path, tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"b.0.weight": torch.zeros(8, 8, dtype=F8), "b.0.weight_scale_inv": torch.ones(1, 1),
             "b.1.weight": torch.zeros(8, 8, dtype=F8)},
            r"b\.1\.weight is F8_E4M3 \[8, 8\] without a scale, but b\.0\.weight has b\.0\.weight_scale_inv",
        ),
        (
            {"a.weight": torch.zeros(32, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(1)},
            r"with a\.weight\.absmax, but without a\.weight\.quant_state\.bitsandbytes__nf4",
        ),
        (
            {"a_scales": torch.zeros(2, 4, 2, dtype=torch.uint8)},
            "a_scales holds the scales of a_blocks, which is not there",
        ),
    ],
    ids=["one block lacks its scale", "no state", "no blocks"],
)  # fmt: skip
def test_what_a_file_lacks_is_told(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(FormatError, match=message) as refused:
        opened(tmp_path, tensors)
    assert refused.value.hint == "the file lacks tensors: download it again"


def test_two_scales_of_a_tensor_are_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": drawn(8, 8).to(F8), "a.scale_weight": torch.ones(1), "a.weight_scale": torch.ones(1)}
    with pytest.raises(FormatError, match=r"a\.weight has 2 scales: a\.scale_weight, a\.weight_scale\n"):
        opened(tmp_path, tensors)
