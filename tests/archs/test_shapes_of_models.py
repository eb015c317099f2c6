"""The generated key names and shapes, held against the lists that another project keeps of the real files."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest

from remelt.archs.shapes import (
    flux_shapes,
    llama_shapes,
    sd1_shapes,
    sd2_shapes,
    sd3_shapes,
    sdxl_refiner_shapes,
    sdxl_shapes,
    without_prefix,
)
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import OptionError

SHAPES = (sd1_shapes, sd2_shapes, sdxl_shapes, sdxl_refiner_shapes, sd3_shapes, flux_shapes)


@pytest.mark.parametrize(
    ("identifier", "shapes"),
    [
        ("sd1-ldm", sd1_shapes),
        ("sdxl-sgm", sdxl_shapes),
        ("sd3-comfyui", sd3_shapes),
        ("flux-flux", flux_shapes),
    ],
)
def test_names_and_shapes_are_those_of_the_real_files(
    identifier: str, shapes: Callable[[], dict[str, TensorInfo]]
) -> None:
    configs = pytest.importorskip("sd_mecha.extensions.model_configs")
    known = configs.resolve(identifier).keys()
    made = {key: tuple(info.shape) for key, info in shapes().items()}
    required = {key: tuple(entry.shape) for key, entry in known.items() if not entry.optional}
    listed = {key: tuple(entry.shape) for key, entry in known.items()}
    assert required.keys() - made.keys() == set()
    assert {key: shape for key, shape in made.items() if listed.get(key) != shape} == {}


def test_the_extras_of_sd1_are_all_the_keys_that_a_file_may_lack() -> None:
    configs = pytest.importorskip("sd_mecha.extensions.model_configs")
    known = {key: tuple(entry.shape) for key, entry in configs.resolve("sd1-ldm").keys().items()}
    assert {key: info.shape for key, info in sd1_shapes(extras=True).items()} == known


@pytest.mark.parametrize("shapes", SHAPES)
def test_a_narrowed_model_has_the_same_keys_and_ranks(shapes: Callable[..., dict[str, TensorInfo]]) -> None:
    full, narrow = shapes(), shapes(64)
    assert full.keys() == narrow.keys()
    assert all(len(info.shape) == len(narrow[key].shape) for key, info in full.items())
    assert sum(prod(info.shape) for info in narrow.values()) * 500 < sum(prod(info.shape) for info in full.values())


@pytest.mark.parametrize(("layers", "tied"), [(2, True), (5, False)])
def test_a_llama_has_as_many_layers_as_asked(layers: int, tied: bool) -> None:
    keys = llama_shapes(layers, 32, heads=4, key_heads=1, tied=tied)
    assert keys["model.layers.1.self_attn.k_proj.weight"] == TensorInfo(DType.BF16, (8, 32))
    assert len(keys) == 9 * layers + 2 + (not tied)


def test_a_bare_component_is_what_stands_under_its_prefix() -> None:
    bare = without_prefix(flux_shapes(64), "model.diffusion_model.")
    assert len(bare) == 780
    assert "double_blocks.0.img_attn.qkv.weight" in bare


def test_a_width_is_divided_by_one_or_more() -> None:
    with pytest.raises(OptionError, match="divided by 1 or more, but not by 0"):
        sd1_shapes(0)
