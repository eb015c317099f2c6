"""Rules for normalisations, and for what runs over an image and leaves its channels alone."""

from __future__ import annotations

from remelt.alignment.derivation.calls import Call, Result, Rules, Traced, settled
from remelt.alignment.derivation.labels import Dimensions, Expression, Pinned, Uniform, pin
from remelt.alignment.derivation.splitting import partition
from remelt.alignment.derivation.tying import joined, settle

RULES = Rules()
_STATISTICS = ("weight", "bias", "running_mean", "running_var")


def _per_channel(call: Call, dimensions: Dimensions, axis: int = 1) -> list[Expression]:
    """The dimensions, with the channels tied to each number that a normalisation has for them."""
    found = list(dimensions)
    for name in _STATISTICS:
        numbers = call.optional(name)
        if numbers is not None and numbers.dimensions:
            found[axis] = joined(found[axis], numbers.dimensions[0])
    return found


@RULES.of("batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "native_batch_norm")
@RULES.of("cudnn_batch_norm", "_native_batch_norm_legit_functional", "_batch_norm_with_update", "instance_norm")
@RULES.of("_batch_norm_no_update", "_native_batch_norm_legit.no_stats")
def batch_norm(call: Call) -> Result:
    """Each channel for itself, statistics included."""
    tensor = call.tensor("self") if "self" in call.arguments else call.tensor("input")
    found = _per_channel(call, tensor.dimensions)
    settle([found[1]])
    channels = found[1]
    first = settled(found)
    rest = [
        Traced((channels,) if shape == (channels.size,) else tuple(Pinned(size) for size in shape))
        for shape in call.shapes[1:]
    ]
    return (first, *rest) if rest else first


@RULES.of("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Result:
    """The last dimensions together, whatever the order of their places."""
    tensor = call.tensor("input")
    found = list(tensor.dimensions)
    first = len(found) - len(call["normalized_shape"])
    settle(found[:first])
    for name in ("weight", "bias"):
        numbers = call.optional(name)
        if numbers is not None:
            for axis, one in enumerate(numbers.dimensions, first):
                found[axis] = joined(found[axis], one)
    rest = [Traced((*found[:first], *(Uniform(size) for size in shape[first:]))) for shape in call.shapes[1:]]
    return (settled(found), *rest) if rest else settled(found)


@RULES.of("group_norm", "native_group_norm")
def group_norm(call: Call) -> Result:
    """Channels in groups: these divide the stream that is normalised."""
    tensor = call.tensor("input")
    groups = call.get("num_groups") or call["group"]
    found = _per_channel(call, tensor.dimensions)
    for axis in range(1, len(found)):
        settle([found[axis]])
    settle(found[:1])
    partition(found[1], found[1].size // groups)
    return (settled(found), *call.pinned()[1:]) if len(call.shapes) > 1 else settled(found)


_OVER_SPACE = {
    f"{kind}{rank}d": rank
    for kind in ("avg_pool", "max_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
    for rank in (1, 2, 3)
}
_OVER_SPACE |= {f"max_pool{rank}d_with_indices": rank for rank in (2, 3)}
_OVER_SPACE |= {f"{kind}_pad{rank}d": rank for kind in ("reflection", "replication") for rank in (1, 2, 3)}
_OVER_SPACE |= {
    f"upsample_{kind}": rank
    for kind, rank in (
        ("nearest1d", 1),
        ("nearest2d", 2),
        ("nearest3d", 3),
        ("linear1d", 1),
        ("bilinear2d", 2),
        ("bicubic2d", 2),
        ("trilinear3d", 3),
        ("_nearest_exact1d", 1),
        ("_nearest_exact2d", 2),
        ("_nearest_exact3d", 3),
    )
}
_OVER_SPACE |= {f"_upsample_{kind}": 2 for kind in ("bilinear2d_aa", "bicubic2d_aa", "nearest_exact2d")}


@RULES.of(*_OVER_SPACE)
def over_space(call: Call) -> Result:
    """What runs over the last dimensions, and does the same to every channel."""
    tensor = call.tensors[0]
    rank = _OVER_SPACE[call.name.removeprefix("aten::")]
    lead = len(tensor.dimensions) - rank
    for dimension in tensor.dimensions[lead:]:
        pin(dimension)
    kept = tensor.dimensions[:lead]
    return tuple(settled([*kept, *(Pinned(size) for size in shape[lead:])]) for shape in call.shapes)
