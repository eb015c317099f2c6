"""Every arch file: its block names partition the keys of its models, in each layout that it has, and mean one thing."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remelt.archs.arch import Arch, all_archs, find_arch
from remelt.archs.dialects import IN_FULL, Spelling, dialects_of, from_original
from remelt.archs.facts import layout
from remelt.archs.shapes import sd1_shapes, sd2_shapes, sdxl_shapes, shapes_of
from remelt.core.tensor_info import TensorInfo

Infos = Mapping[str, TensorInfo]
MODELS: dict[str, tuple[str, Infos]] = {name: (name, shapes_of(name) or {}) for name in all_archs()}
MODELS |= {
    f"{name}, as training left it": (name, made(64, extras=True))
    for name, made in (("sd1", sd1_shapes), ("sd2", sd2_shapes), ("sdxl", sdxl_shapes))
}


def spelled(arch: Arch, dialect: str, shapes: Infos) -> tuple[Spelling, list[str]]:
    if dialect == "original":
        return IN_FULL, list(shapes)
    return Spelling(dialect), list(from_original(arch, Spelling(dialect), shapes).tensors)


@pytest.mark.parametrize("model", MODELS)
def test_the_blocks_of_an_arch_partition_its_keys(model: str) -> None:
    name, shapes = MODELS[model]
    assert shapes, "an arch file needs the names and shapes of a full-size model in `shapes_of`"
    arch = find_arch(name)
    for dialect in dialects_of(arch):
        spelling, keys = spelled(arch, dialect, shapes)
        found = layout(keys, arch, spelling)
        held = [key for members in found.blocks.values() for key in members]
        assert sorted(held) == sorted(keys), dialect  # none outside, none in two
        assert set(found.blocks) <= found.block_names
        assert not found.ambiguous.keys() & found.block_names
        named = {key: [block for block in arch.blocks if block.match(arch.canonical(key))] for key in shapes}
        assert [key for key, blocks in named.items() if len(blocks) > 1] == []
        assert all(key in found.groups[group] for group in found.groups for key in found.groups[group])


@pytest.mark.parametrize("model", MODELS)
def test_the_name_of_a_block_says_of_which_component_it_is(model: str) -> None:
    name, shapes = MODELS[model]
    found = layout(list(shapes), find_arch(name))
    for block, members in found.blocks.items():
        components = {found.facts(key).component for key in members} - {"ema"}  # an average goes with what it averages
        assert len(components) <= 1, block
        assert len({found.facts(key).blocks for key in members if found.facts(key).stack is None}) <= 1, block


def test_modules_of_two_components_are_told_apart_by_the_components_and_shorter_names_ask_back() -> None:
    found = layout(list(MODELS["sd3"][1]), find_arch("sd3"))
    assert {"clip_l.embeddings", "clip_g.embeddings", "t5xxl.shared", "final_layer", "vae.decoder.mid"} <= set(
        found.blocks
    )
    assert "embeddings" not in found.block_names
    assert found.ambiguous["vae.mid"] == ("vae.decoder.mid", "vae.encoder.mid")


def test_a_name_that_an_arch_declares_is_never_ambiguous() -> None:
    found = layout(list(MODELS["sd1"][1]), find_arch("sd1"))
    assert found.facts("model.diffusion_model.middle_block.1.norm.weight").blocks[:2] == ("M00", "mid")
    assert "mid" not in found.ambiguous


segments = st.sampled_from(["layers", "norm", "weight", "0", "1", "12", "model", "head", "encoder"])


@given(st.lists(st.lists(segments, min_size=1, max_size=6).map(".".join), min_size=1, max_size=12, unique=True))
def test_the_inferred_blocks_of_any_keys_partition_them(keys: list[str]) -> None:
    found = layout(keys, None)
    assert sorted(key for members in found.blocks.values() for key in members) == sorted(keys)
    for key in keys:
        full = found.facts(key).blocks[-1]
        assert full == key or key.startswith(f"{full}.")


@pytest.mark.parametrize(
    ("keys", "blocks"),
    [
        (["in.weight", "layers.0.a.w", "layers.1.a.w", "out.0.weight", "out.1.weight"],
         ["in", "layers.0", "layers.1", "out"]),
        (["m.norm.weight", "m.layers.0.a.w", "m.layers.1.a.w", "m.scale", "n.norm.weight"],
         ["layers.0", "layers.1", "n", "norm", "scale"]),
        (["m.layers.norm.weight", "m.layers.0.a.w", "m.layers.1.a.w"], ["layers.0", "layers.1", "norm"]),
        (["unet/conv_in.weight", "vae/conv_in.weight", "vae/out"], ["out", "unet/conv_in", "vae/conv_in"]),
        (["a.3", "b"], ["a", "b"]),
    ],
)  # fmt: skip
def test_what_stands_outside_stacks_belongs_to_the_outermost_module_without_one(
    keys: list[str], blocks: list[str]
) -> None:
    assert list(layout(keys, None).blocks) == blocks
