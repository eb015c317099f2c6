"""Every arch there and back: keys, shapes, order and blocks in each dialect, and what is refused, with the keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remelt.api.dialect_views import respelled
from remelt.archs.arch import Arch, Component, all_archs, find_arch
from remelt.archs.detect import detect
from remelt.archs.dialects import (
    IN_FULL,
    ORIGINAL,
    Spelling,
    dialects_of,
    from_original,
    is_of_folders,
    original_key,
    to_original,
    usual_key,
)
from remelt.archs.facts import layout
from remelt.archs.maps import key_map
from remelt.archs.shapes import shapes_of
from remelt.core.dtype import DType
from remelt.core.pieces import Converted
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError, OptionError
from remelt.formats.memory import MemoryCheckpoint

Shapes = dict[str, TensorInfo]
THERE = Spelling("diffusers")
WITH_DIALECTS = [name for name in all_archs() if shapes_of(name) is not None and len(dialects_of(find_arch(name))) > 1]
CASES = [(name, dialect) for name in WITH_DIALECTS for dialect in dialects_of(find_arch(name)) if dialect != ORIGINAL]
SCALED = ("sd1", "sd2", "sdxl", "sd3", "flux")


def shapes(name: str) -> Shapes:
    """The full-size model, with the names that its keys have in a whole checkpoint."""
    found = shapes_of(name)
    assert found is not None
    return {find_arch(name).canonical(key): info for key, info in found.items()}


def there(name: str, dialect: str = "diffusers") -> Shapes:
    """The full-size model in another dialect."""
    return infos(from_original(find_arch(name), Spelling(dialect), shapes(name)).tensors)


def infos(made: Mapping[str, Converted]) -> Shapes:
    return {key: one.info for key, one in made.items()}


def declared(arch: Arch, dialect: str, key: str) -> bool:
    """Whether an original key is declared to have no place in a dialect."""
    component = arch.component_of(key)
    part = None if component is None else part_of(component[0], dialect)
    if part is None:
        return arch.is_copied(key) and (is_of_folders(arch, dialect) or key.startswith("model_ema."))
    return any(matches(glob, key) for glob in part)


def part_of(component: Component, dialect: str) -> tuple[str, ...] | None:
    return next((one.left_out for one in component.dialects if one.dialect == dialect), None)


def matches(glob: str, key: str) -> bool:
    return re.search("(?:^|\\.)" + re.escape(glob).replace("\\*", ".*") + "$", key) is not None


def test_there_are_archs_with_dialects() -> None:
    assert set(SCALED) <= set(WITH_DIALECTS)


@pytest.mark.parametrize(("name", "dialect"), CASES)
def test_there_and_back_every_key_that_has_a_place_is_as_it_was(name: str, dialect: str) -> None:
    arch, original = find_arch(name), shapes(name)
    made = from_original(arch, Spelling(dialect), original)
    assert made.unknown == []
    assert len(made.left_out) < 30
    assert all(declared(arch, dialect, key) for key in made.left_out)
    back = to_original(arch, Spelling(dialect), infos(made.tensors))
    assert back.unknown == []
    expected = {key: info for key, info in original.items() if key not in made.left_out}
    assert infos(back.tensors) == expected
    sizes = [sum(info.nbytes for info in found.values()) for found in (expected, infos(made.tensors))]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(("name", "dialect"), CASES)
def test_every_byte_is_in_one_piece_of_the_other_dialect(name: str, dialect: str) -> None:
    original = shapes(name)
    made = from_original(find_arch(name), Spelling(dialect), original)
    taken: dict[str, list[tuple[int, int]]] = {}
    for one in made.tensors.values():
        for piece in one.pieces:
            taken.setdefault(piece.key, []).append((piece.start, piece.stop))
    assert taken.keys() == original.keys() - set(made.left_out)
    for key, ranges in taken.items():
        stops = [0, *(stop for _, stop in sorted(ranges))]
        assert [start for start, _ in sorted(ranges)] == stops[:-1]
        assert stops[-1] == (original[key].shape or (1,))[0]


@pytest.mark.parametrize(("name", "dialect"), CASES)
def test_a_model_is_recognised_in_each_dialect_and_by_its_denoiser_alone(name: str, dialect: str) -> None:
    arch, original, other = find_arch(name), shapes(name), there(name, dialect)
    if not arch.part:  # whose keys no file spells in full
        found, plain = detect(other), detect(original)
        assert (found.arch, found.spelling, found.problem) == (arch, Spelling(dialect), None)
        assert (plain.arch, plain.spelling) == (arch, IN_FULL)
        assert [one.name for one in found.variants] == [one.name for one in plain.variants]
    for component in (one for one in arch.components if one.bare):
        start = component.prefixes[0]
        alone = {key.removeprefix(start): info for key, info in original.items() if key.startswith(start)}
        assert (detect(alone).arch, detect(alone).spelling) == (arch, Spelling(ORIGINAL, component.name))
        bare_keys = set(alone)
        folder = next(one.folder for one in component.dialects if one.dialect == dialect)
        if not folder:  # a prefix of keys stays on a part alone
            continue
        alone = {key.removeprefix(f"{folder}/"): info for key, info in other.items() if key.startswith(f"{folder}/")}
        spelled = Spelling(ORIGINAL if set(alone) == bare_keys else dialect, component.name)
        assert (detect(alone).arch, detect(alone).spelling) == (arch, spelled)


@pytest.mark.parametrize(("name", "dialect"), CASES)
def test_a_key_has_the_same_blocks_in_every_dialect(name: str, dialect: str) -> None:
    arch, original = find_arch(name), shapes(name)
    made = from_original(arch, Spelling(dialect), original).tensors
    ours, theirs = layout(list(original), arch), layout(list(made), arch, Spelling(dialect))
    assert set(theirs.blocks) <= set(ours.blocks)
    for key, one in made.items():
        there_facts, facts = theirs.facts(key), ours.facts(one.pieces[0].key)
        assert there_facts.blocks == facts.blocks
        assert (there_facts.component, there_facts.groups) == (facts.component, facts.groups)
        assert there_facts.copied == facts.copied
        assert original_key(arch, Spelling(dialect), key) == one.pieces[0].key


@pytest.mark.parametrize(("name", "dialect"), CASES)
def test_a_part_stands_in_the_order_of_the_file_that_it_comes_from(name: str, dialect: str) -> None:
    arch, original = find_arch(name), shapes(name)
    made = from_original(arch, Spelling(dialect), original).tensors
    order = {key: at for at, key in enumerate(original)}
    parts = [one for component in arch.components for one in component.dialects if one.dialect == dialect]
    for start in (one.prefix or f"{one.folder}/" for one in parts):
        places = [
            (order[one.pieces[0].key], one.pieces[0].start if len(one.pieces) == 1 else 0)
            for key, one in made.items()
            if key.startswith(start)
        ]
        assert places == sorted(places)
    back = to_original(arch, Spelling(dialect), infos(made)).tensors
    first = {key: at for at, key in enumerate(made)}
    places_back = [min(first[piece.key] for piece in one.pieces) for one in back.values()]
    assert places_back == sorted(places_back)


@pytest.mark.parametrize("name", SCALED)
def test_all_the_names_that_are_read_for_a_key_lead_to_the_one_that_is_written(name: str) -> None:
    arch = find_arch(name)
    for component in arch.components:
        for part in component.dialects:
            known = key_map(part.key_map, part.below)
            start, there = component.prefixes[0], part.prefix or f"{part.folder}/"
            for key in (key[len(start) :] for key in shapes(name) if key.startswith(start)):
                for names in known.spellings(key):
                    written = [usual_key(arch, Spelling(part.dialect), there + one) for one in names]
                    assert written == [there + names[0]] * len(names)
                    assert {known.original(one) for one in names} == {key}


def respelled_to(made: Iterable[tuple[str, TensorInfo]], wanted: Spelling, name: str = "sd1") -> None:
    """Take tensors of a model in diffusers' layout to another spelling, as a merge does."""
    content = {key: (info, bytes(info.nbytes)) for key, info in made}
    respelled(MemoryCheckpoint(content), find_arch(name), THERE, wanted)


def few(name: str, *marks: str) -> Shapes:
    """Some tensors of a model in diffusers' layout, with next to no data."""
    return {key: info for key, info in there(name).items() if any(mark in key for mark in marks)}


def test_two_dialects_in_one_file_are_refused_by_the_keys() -> None:
    mixed = few("sd1", "conv_in.weight") | {"model.diffusion_model.out.0.bias": TensorInfo(DType.F32, (320,))}
    with pytest.raises(OptionError) as caught:
        respelled_to(mixed.items(), IN_FULL)
    assert caught.value.message == (
        "1 of its keys are of no part that is known of the diffusers layout of sd1, and would be lost: "
        "model.diffusion_model.out.0.bias"
    )
    assert caught.value.hint == "leave them out before: pick_component or omit_component"


def test_keys_of_no_known_part_are_told_a_few_of_many() -> None:
    strange = {f"unet/adapter.{at}.weight": TensorInfo(DType.F32, (1,)) for at in range(5)}
    strange |= {"safety_checker/concept_embeds": TensorInfo(DType.F32, (1,))}
    with pytest.raises(OptionError) as caught:
        respelled_to((few("sd1", "conv_in.weight") | strange).items(), IN_FULL)
    assert caught.value.message == (
        "5 of its keys are of no part that is known of the diffusers layout of sd1, and would be lost: "
        "unet/adapter.0.weight, unet/adapter.1.weight, unet/adapter.2.weight and 2 more"
    )
    original = {"control_model.input_blocks.0.0.weight": TensorInfo(DType.F32, (1,))}
    assert from_original(find_arch("sd1"), THERE, original).unknown == list(original)
    assert original.keys() == infos(to_original(find_arch("sd1"), IN_FULL, original).tensors).keys()


@pytest.mark.parametrize(
    ("name", "mark", "lost", "message"),
    [
        (
            "sdxl",
            "text_encoder_2/text_model.encoder.layers.0.self_attn",
            "k_proj.bias",
            (
                "model.transformer.resblocks.0.attn.in_proj_bias consists of 3 tensors, but "
                "text_model.encoder.layers.0.self_attn.k_proj.bias is missing"
            ),
        ),
        (
            "flux",
            "single_transformer_blocks.0",
            "proj_mlp",
            (
                "single_blocks.0.linear1.weight consists of 4 tensors, but "
                "single_transformer_blocks.0.proj_mlp.weight is missing"
            ),
        ),
        (
            "sd3",
            "transformer_blocks.0.attn",
            "attn.to_",
            (
                "joint_blocks.0.x_block.attn.qkv.weight consists of 3 tensors, but "
                "transformer_blocks.0.attn.to_q.weight, transformer_blocks.0.attn.to_v.weight are missing"
            ),
        ),
    ],
)
def test_a_part_that_is_missing_is_named(name: str, mark: str, lost: str, message: str) -> None:
    kept = {key: info for key, info in few(name, mark).items() if lost not in key or ".to_k.w" in key}
    with pytest.raises(FormatError) as caught:
        to_original(find_arch(name), THERE, kept)
    assert caught.value.message == message


def test_two_names_of_one_tensor_are_refused() -> None:
    start = "vae/encoder.mid_block.attentions.0."
    both = {f"{start}{name}.weight": TensorInfo(DType.F32, (4, 4)) for name in ("to_q", "query")}
    with pytest.raises(FormatError) as caught:
        to_original(find_arch("sd1"), THERE, both)
    assert caught.value.message == (
        "encoder.mid_block.attentions.0.to_q.weight and encoder.mid_block.attentions.0.query.weight "
        "are two names for one tensor"
    )
    prefixed = {
        f"{start}decoder.conv_in.weight": TensorInfo(DType.F32, (4,)) for start in ("first_stage_model.", "vae.")
    }
    with pytest.raises(FormatError) as caught:
        from_original(find_arch("flux"), THERE, prefixed)
    assert caught.value.message == (
        "first_stage_model.decoder.conv_in.weight and vae.decoder.conv_in.weight are two names for one tensor"
    )
    parts = {
        f"text_encoder_2/{start}encoder.layers.0.self_attn.{name}_proj.bias": TensorInfo(DType.F32, (4,))
        for start in ("text_model.", "")
        for name in "qkv"
    }
    with pytest.raises(FormatError, match=r"^text_model\.\S+q_proj.bias and encoder\.\S+q_proj.bias are two names"):
        to_original(find_arch("sdxl"), THERE, parts)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (
            "double_blocks.0.img_attn.qkv.scale_weight",
            (),
            "qkv.scale_weight is [], which cannot be divided into 3 parts",
        ),
        ("double_blocks.0.img_attn.qkv.scale_weight", (1,), "is [1], which cannot be divided into 3 parts: = = ="),
        ("final_layer.adaLN_modulation.1.weight", (3, 2), "1.weight is [3, 2], which has no two halves"),
    ],
)
def test_what_cannot_be_divided_is_refused(key: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(FormatError, match=re.escape(message)):
        from_original(find_arch("flux"), THERE, {f"model.diffusion_model.{key}": TensorInfo(DType.F32, shape)})


@pytest.mark.parametrize("rows", [(8, 4, 4), (4, 4, 8)])
def test_parts_that_could_not_be_divided_so_again_are_refused(rows: tuple[int, ...]) -> None:
    start = "transformer/transformer_blocks.0.attn.to_"
    parts = {f"{start}{name}.weight": TensorInfo(DType.F32, (size, 8)) for name, size in zip("qkv", rows, strict=True)}
    with pytest.raises(FormatError, match=r"qkv.weight cannot be put together of .*it could not be divided so again"):
        to_original(find_arch("flux"), THERE, parts)
    start = "transformer/single_transformer_blocks.0."
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    narrow = {f"{start}{name}.weight": TensorInfo(DType.F32, (6, 8)) for name in names}
    with pytest.raises(FormatError, match=r"single_blocks.0.linear1.weight cannot be put together of "):
        to_original(find_arch("flux"), THERE, narrow)


KEYS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["unet/" + "7" * 5000, "unet/down_blocks.#.resnets.0.conv1.weight", "vae/٣.x", "unet/mid_block."]),
    *(st.sampled_from([key for key in there(name) if "transformer/" in key or "conv_in" in key]) for name in SCALED),
)
INFOS = st.builds(
    TensorInfo, st.sampled_from([DType.F32, DType.F16]), st.lists(st.integers(0, 3), max_size=4).map(tuple)
)


@given(st.dictionaries(KEYS, INFOS, max_size=12), st.sampled_from(SCALED))
def test_tensors_of_any_shape_are_converted_there_and_back_or_refused(made: Shapes, name: str) -> None:
    arch = find_arch(name)
    found = detect(made)
    assert found.evidence
    for key in made:
        assert bool(original_key(arch, THERE, key)) == bool(key)
    try:
        original = to_original(arch, THERE, made)
        again = from_original(arch, THERE, infos(original.tensors))
    except FormatError as error:
        assert error.message
        return
    assert {usual_key(arch, THERE, key): info for key, info in made.items() if key not in original.unknown} == infos(
        again.tensors
    )
