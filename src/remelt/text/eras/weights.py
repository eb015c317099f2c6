"""Weights by block as older recipes name them: ``sd1_unet_block_in2=0.75 sd1_txt_default=0.33``.

A key's weight was the mean of those of all blocks that it belonged to, else its component's default, else 0. That some
keys belong to several blocks, as the embedding of time does, is why these recipes need a table of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError
from remelt.recipe.blocks import KEYS, BlockWeights, Rule


@dataclass(frozen=True)
class _Component:
    """A component: the beginning of its keys, and for what follows it the blocks that it belonged to."""

    prefix: str
    members: Mapping[str, tuple[str, ...]]

    @property
    def blocks(self) -> set[str]:
        return {block for blocks in self.members.values() for block in blocks}


def _stack(path: str, name: str, count: int) -> dict[str, tuple[str, ...]]:
    return {path.format(i=i): (name.format(i=i),) for i in range(count)}


def _unet(depth: int) -> _Component:
    """A U-Net of as many blocks on each side; the embedding of time belonged to all but the first and the downward."""
    inside = [f"in{i}" for i in range(depth) if i % 3]
    outside = [f"out{i}" for i in range(depth)]
    return _Component(
        "model.diffusion_model",
        {
            **_stack("input_blocks.{i}", "in{i}", depth),
            "middle_block": ("mid",),
            **_stack("output_blocks.{i}", "out{i}", depth),
            "time_embed": (*inside, "mid", *outside),
            "out": (f"out{depth - 1}",),
        },
    )


def _encoder(prefix: str, layers: str, count: int, first: Iterable[str], last: Iterable[str]) -> _Component:
    """A text encoder: its embeddings belonged to the first block, what follows the layers to the last."""
    return _Component(
        prefix,
        {
            **_stack(layers, "in{i}", count),
            **dict.fromkeys(first, ("in0",)),
            **dict.fromkeys(last, (f"in{count - 1}",)),
        },
    )


def _mmdit(depth: int) -> _Component:
    everywhere = tuple(f"in{i}" for i in range(depth))
    return _Component(
        "model.diffusion_model",
        {
            **_stack("joint_blocks.{i}", "in{i}", depth),
            **dict.fromkeys(("pos_embed", "t_embedder", "x_embedder", "y_embedder"), everywhere),
            "context_embedder": ("in0",),
            "final_layer": (f"in{depth - 1}",),
        },
    )


def _sd3(depth: int) -> dict[str, _Component]:
    clip = "text_model.encoder.layers.{i}"
    embeddings, norm = "text_model.embeddings", "text_model.final_layer_norm"
    return {
        "unet": _mmdit(depth),
        "txt": _encoder("text_encoders.clip_l.transformer", clip, 12, [embeddings], [norm]),
        "txt2": _encoder("text_encoders.clip_g.transformer", clip, 32, [embeddings], [norm, "text_projection"]),
        "t5xxl": _encoder(
            "text_encoders.t5xxl.transformer",
            "encoder.block.{i}",
            24,
            ["encoder.embed_tokens", "shared"],
            ["encoder.final_layer_norm"],
        ),
    }


def _flux() -> dict[str, _Component]:
    double, single = [f"double{i}" for i in range(19)], [f"single{i}" for i in range(38)]
    clip = "transformer.text_model.embeddings."
    return {
        "transformer": _Component(
            "model.diffusion_model",
            {
                **_stack("double_blocks.{i}", "double{i}", 19),
                **_stack("single_blocks.{i}", "single{i}", 38),
                **dict.fromkeys(("time_in", "vector_in", "guidance_in"), (*double, *single)),
                **dict.fromkeys(("img_in", "txt_in"), ("double0",)),
                "final_layer": ("single37",),
            },
        ),
        "clip_l": _encoder(
            "text_encoders.clip_l",
            "transformer.text_model.encoder.layers.{i}",
            12,
            [f"{clip}position_embedding", f"{clip}token_embedding"],
            ["transformer.text_projection", "logit_scale"],
        ),
        "t5xxl": _encoder(
            "text_encoders.t5xxl",
            "transformer.encoder.block.{i}",
            24,
            ["transformer.shared.weight"],
            ["transformer.encoder.final_layer_norm.weight", "logit_scale"],
        ),
    }


_CLIP_L = ("encoder.layers.{i}", 12, ["embeddings"], ["final_layer_norm"])
ARCHS: dict[str, dict[str, _Component]] = {
    "sd1": {"txt": _encoder("cond_stage_model.transformer.text_model", *_CLIP_L), "unet": _unet(12)},
    "sdxl": {
        "unet": _unet(9),
        "txt": _encoder("conditioner.embedders.0.transformer.text_model", *_CLIP_L),
        "txt2": _encoder(
            "conditioner.embedders.1.model",
            "transformer.resblocks.{i}",
            32,
            ["positional_embedding", "token_embedding"],
            ["ln_final", "text_projection", "logit_scale"],
        ),
    },
    "sd3": _sd3(24),
    "sd35": _sd3(38),
    "flux": _flux(),
}
"""The archs of the headerless era, with their components and blocks."""
_NAME = re.compile(
    r"(?P<arch>[a-z0-9]+)_(?P<component>[a-z0-9_]+?)_(?:default|block_(?P<block>\w+)|class_(?P<class>\w+))"
)


class WeightNameError(RecipeError):
    """A weight has a name that no arch of that era had; ``name`` is it."""

    def __init__(self, name: str, message: str, hint: str | None) -> None:
        super().__init__(message, hint=hint)
        self.name = name


def block_names(arch: str, component: str) -> list[str]:
    """The names of a component's blocks, in natural order.

    >>> block_names("sd1", "unet")[:3]
    ['in0', 'in1', 'in2']
    """
    return sorted(_component(arch, component).blocks, key=lambda name: [
        (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)
    ])  # fmt: skip


def components_of(arch: str) -> list[str]:
    """The names of an arch's components; `RecipeError` for an arch that this era did not have."""
    if arch not in ARCHS:
        raise RecipeError(f"{arch!r} is no arch of sd-mecha 0", hint=nearest_hint(arch, ARCHS) or ", ".join(ARCHS))
    return list(ARCHS[arch])


def _component(arch: str, component: str) -> _Component:
    known = components_of(arch)
    if component not in known:
        hint = nearest_hint(component, known) or ", ".join(known)
        raise RecipeError(f"{component!r} is no component of {arch}", hint=hint)
    return ARCHS[arch][component]


def block_weights(named: Mapping[str, float]) -> BlockWeights | float:
    """Today's weights for those that an older recipe names; `WeightNameError` for a name that it did not know.

    >>> block_weights({"sd1_txt_default": 0.5})
    keys({'cond_stage_model.transformer.text_model.*': 0.5}, optional=True) | 0.0
    """
    given: dict[tuple[str, str], dict[str, float]] = {}
    defaults: dict[tuple[str, str], float] = {}
    for name, value in named.items():
        found = _NAME.fullmatch(name)
        if found is None:
            raise WeightNameError(name, f"{name!r} names no weight", "as in sd1_unet_block_in2 or sd1_txt_default")
        if found["class"] is not None:
            raise WeightNameError(
                name,
                f"{name!r} is a weight by class of layers, which recipes of this grammar no longer had at their end",
                'write it in version 1, with classes({"attn1.to_q": 0.5})',
            )
        try:
            component = _component(found["arch"], found["component"])
        except RecipeError as error:
            raise WeightNameError(name, error.message, error.hint) from None
        place = found["arch"], found["component"]
        if found["block"] is None:
            defaults[place] = float(value)
        elif found["block"] in component.blocks:
            given.setdefault(place, {})[found["block"]] = float(value)
        else:
            hint = nearest_hint(found["block"], component.blocks)
            raise WeightNameError(name, f"{found['block']!r} is no block of the {place[1]} of {place[0]}", hint)
    weights: dict[str, float] = {}
    for (arch, name), values in given.items():
        component = ARCHS[arch][name]
        for path, blocks in component.members.items():
            found_values = [values[block] for block in blocks if block in values]
            if found_values:
                mean = sum(found_values) / len(found_values)
                weights |= dict.fromkeys(_globs(f"{component.prefix}.{path}"), mean)
    for (arch, name), value in defaults.items():
        weights[f"{ARCHS[arch][name].prefix}.*"] = value
    if not weights:
        return 0.0
    return _by_key(weights)


def _by_key(weights: Mapping[str, float]) -> BlockWeights:
    """Weights by patterns of keys, which a smaller model may lack; 0 for the rest, as it was."""
    return BlockWeights((Rule(KEYS, named=tuple(weights.items()), optional=True),), default=0.0)


_LEAVES = ("positional_embedding", "pos_embed", "text_projection", "logit_scale", "weight")


def _globs(path: str) -> tuple[str, ...]:
    """Patterns for the keys at a path: those below it, and itself where it is a tensor."""
    return (path, f"{path}.*") if path.endswith(_LEAVES) else (f"{path}.*",)


_FIRST_NAME = re.compile(r"(?:(?:sd15_)?(?P<unet>unet)|(?:l14_|sd15_)?txt)_(?:(?P<kind>class|block)_)?(?P<name>\w+)")
_FIRST_BLOCK = re.compile(r"(?P<side>in|mid|out)(?P<number>\d+)?")


def first_weights(named: Mapping[str, float]) -> BlockWeights | float:
    """Today's weights for those that the first recipes name: ``unet_class_op=1 txt_class_default=0``.

    Of weights by class of layers, only those are known that are the same for all of a component.

    >>> first_weights({"sd15_unet_block_in03": 0.5})
    keys({'model.diffusion_model.input_blocks.3.*': 0.5}, optional=True) | 0.0
    """
    weights: dict[str, float] = {}
    defaults: dict[str, float] = {}
    for name, value in named.items():
        found = _FIRST_NAME.fullmatch(name)
        if found is None:
            raise WeightNameError(name, f"{name!r} names no weight", "as in sd15_unet_block_in02 or l14_txt_default")
        component = "unet" if found["unet"] else "txt"
        if found["kind"] == "block" and found["name"] != "default":
            path = _first_path(component, found["name"])
            if path is None:
                raise WeightNameError(name, f"{found['name']!r} is no block of the {component}", "as in in02 or out11")
            weights[f"{path}.*"] = float(value)
        elif defaults.setdefault(component, float(value)) != float(value):
            raise WeightNameError(
                name,
                f"{name!r} differs from those before: weights by class of layers are read where all are the same",
                'write it in version 1, with classes({"attn1.to_q": 0.5})',
            )
    for component, value in defaults.items():
        weights[f"{ARCHS['sd1'][component].prefix}.*"] = value
    return _by_key(weights) if weights else 0.0


def _first_path(component: str, block: str) -> str | None:
    """Where the keys of a block of the first recipes begin."""
    prefix = ARCHS["sd1"][component].prefix
    special = {"unet": {"out": "out"}, "txt": {"embed": "embeddings", "final": "final_layer_norm"}}[component]
    if block in special:
        return f"{prefix}.{special[block]}"
    found = _FIRST_BLOCK.fullmatch(block)
    if found is None or (found["number"] is None and found["side"] != "mid"):
        return None
    name = "mid" if found["side"] == "mid" else f"{found['side']}{int(found['number'])}"
    paths = (path for path, blocks in ARCHS["sd1"][component].members.items() if blocks == (name,))
    first = next(paths, None)
    return None if first is None else f"{prefix}.{first}"
