"""The axis groups of vision transformers and residual networks, as several libraries name them."""

from __future__ import annotations

import pytest

from remelt.archs.axes.find import axis_groups
from remelt.archs.axes.heads import HeadRule
from remelt.archs.axes.recognise import recognise_network
from remelt.archs.axis_groups import Shapes, faults
from remelt.archs.shapes import other_shapes
from remelt.errors import RefusedError

VIT = {key: info.shape for key, info in other_shapes("vit").items()}
HEAD = ("classifier.weight", "classifier.bias")


def structures(arch: str, shapes: Shapes, heads: dict[str, HeadRule] | None = None) -> dict[str, str]:
    """Of sound groups, by their names."""
    groups = axis_groups(arch, shapes, heads)
    assert list(faults(groups, shapes)) == []
    return {group.name: group.structure for group in groups}


def timm(width: int, *, norms: bool = False) -> Shapes:
    """One block of timm's, with a classifier, registers and scales of layers."""
    vectors = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma", "attn.proj.bias"]
    found = {f"blocks.0.{name}": (width,) for name in (*vectors, "mlp.fc2.bias")}
    found |= {"blocks.0.attn.qkv.weight": (3 * width, width), "blocks.0.attn.qkv.bias": (3 * width,)}
    found |= {"blocks.0.attn.proj.weight": (width, width), "blocks.0.mlp.fc1.bias": (4 * width,)}
    found |= {"blocks.0.mlp.fc1.weight": (4 * width, width), "blocks.0.mlp.fc2.weight": (width, 4 * width)}
    found |= {"cls_token": (1, 1, width), "reg_token": (1, 4, width), "pos_embed": (1, 10, width)}
    found |= {"patch_embed.proj.weight": (width, 3, 2, 2), "patch_embed.proj.bias": (width,)}
    found |= {"norm.weight": (width,), "norm.bias": (width,), "head.weight": (5, width), "head.bias": (5,)}
    return found | ({f"blocks.0.attn.{part}_norm.weight": (16,) for part in "qk"} if norms else {})


def resnet(*, statistics: bool = True) -> Shapes:
    """A stem and two stages of one basic block each, without a head for classes."""
    found: dict[str, tuple[int, ...]] = {"conv1.weight": (8, 3, 7, 7), "layer1.0.conv1.weight": (8, 8, 3, 3)}
    found |= {"layer1.0.conv2.weight": (8, 8, 3, 3), "layer2.0.conv1.weight": (16, 8, 3, 3)}
    found |= {"layer2.0.conv2.weight": (16, 16, 3, 3), "layer2.0.downsample.0.weight": (16, 8, 1, 1)}
    norms = {"bn1": 8, "layer1.0.bn1": 8, "layer1.0.bn2": 8, "layer2.0.bn1": 16, "layer2.0.bn2": 16}
    for name, width in {**norms, "layer2.0.downsample.1": 16}.items():
        tensors = ("weight", "bias", "running_mean", "running_var") if statistics else ("weight", "bias")
        found |= {f"{name}.{tensor}": (width,) for tensor in tensors}
    return found


WITH_CLASSES = {"fc.weight": (5, 16), "fc.bias": (5,)}


def test_the_published_sizes_have_known_heads() -> None:
    found = structures("vit", {**VIT, "classifier.weight": (1000, 768), "classifier.bias": (1000,)})
    assert found["layers.11.attention"] == "heads" and found["stream"] == "free"


def test_a_stream_that_is_put_out_stays_as_it_is() -> None:
    assert structures("vit", {key: shape for key, shape in VIT.items() if key not in HEAD})["stream"] == "fixed"


@pytest.mark.parametrize(
    ("shapes", "heads", "structure"),
    [
        (timm(192), {}, "heads"),
        (timm(80), {}, "fixed"),
        (timm(80, norms=True), {}, "heads"),
        (timm(80), {"vision": HeadRule(count=5)}, "heads"),
    ],
)
def test_attention_stays_as_it_is_where_nothing_tells_its_heads(
    shapes: Shapes, heads: dict[str, HeadRule], structure: str
) -> None:
    assert recognise_network(shapes) == "vit"
    assert structures("vit", shapes, heads)["layers.0.attention"] == structure


def test_other_names_are_refused() -> None:
    with pytest.raises(RefusedError) as refused:
        axis_groups("vit", {"tokens.weight": (4, 4)})
    assert str(refused.value) == (
        "a vision transformer has patches and numbered layers, but no names for them that are known are there\n"
        "hint: transformers', timm's and torchvision's names are known"
    )


def test_a_stage_without_a_shortcut_goes_on_with_the_stream_before_it() -> None:
    shapes = resnet() | WITH_CLASSES
    assert recognise_network(shapes) == "resnet"
    assert structures("resnet", shapes) == {
        "pixels": "fixed",
        "stem": "free",
        "layer1.0.conv1": "free",
        "layer2.0.downsample": "free",
        "layer2.0.conv1": "free",
        "classes": "fixed",
    }


def test_what_a_network_without_classes_puts_out_stays_as_it_is() -> None:
    assert structures("resnet", resnet())["layer2.0.downsample"] == "fixed"


def test_norms_without_statistics_have_as_many_groups_as_is_told() -> None:
    shapes = resnet(statistics=False) | WITH_CLASSES
    assert set(structures("resnet", shapes).values()) == {"fixed"}
    four, one = ({"norm": HeadRule(count=count)} for count in (4, 1))
    assert {*structures("resnet", shapes, four).values()} == {"fixed", "groups"}
    assert {*structures("resnet", shapes, one).values()} == {"fixed", "free"}


def test_a_convolution_in_groups_is_known_inside_of_a_block_only() -> None:
    with pytest.raises(RefusedError) as refused:
        axis_groups("resnet", resnet() | WITH_CLASSES | {"layer1.0.conv1.weight": (8, 1, 3, 3)})
    assert str(refused.value) == (
        "a residual block may have groups of channels inside, but layer1.0.conv1 reads 1 of 8\n"
        "hint: groups of a module that is none of torchvision's can be derived from it"
    )


def test_a_network_of_other_names_is_no_residual_network() -> None:
    with pytest.raises(RefusedError) as refused:
        axis_groups("resnet", {"stem.weight": (8, 3, 3, 3)})
    assert str(refused.value) == (
        "a residual network begins with 'conv1' and 'layer1.0', which are not there\n"
        "hint: torchvision's names are known"
    )
