"""The axis groups of residual networks in torchvision's names: basic blocks, bottlenecks and grouped convolutions."""

from __future__ import annotations

from remelt.archs.axes.draft import GROUP, MEMBER, Draft, Drafts
from remelt.archs.axes.heads import HeadRule, Heads
from remelt.archs.axes.transformer import fix, fixed, numbers_after
from remelt.archs.axis_groups import AxisGroup, Level, Shapes
from remelt.errors import RefusedError

_SHORTCUTS = ("downsample", "shortcut")
_CLASSES = ("fc", "linear")
_INTO = "into"


def resnet_groups(shapes: Shapes, heads: Heads) -> tuple[AxisGroup, ...]:
    """All groups of a residual network, statistics of its BatchNorms included; of any depth.

    A stage's blocks add to one stream, which begins with the convolution of its shortcut. Norms without statistics are
    GroupNorms or others: ``heads["norm"]`` tells how many groups they have; if it does not, their channels are fixed.
    """
    if "conv1.weight" not in shapes or "layer1.0.conv1.weight" not in shapes:
        raise RefusedError(
            "a residual network begins with 'conv1' and 'layer1.0', which are not there",
            hint="torchvision's names are known",
        )
    drafts, norms = Drafts(shapes), heads.get("norm")
    fixed(drafts, "conv1.weight", 1, "pixels")
    stream = _begun(drafts, "stem", "conv1", "bn1", norms)
    for stage in numbers_after(shapes, "layer"):
        for number in numbers_after(shapes, f"layer{stage}."):
            stream = _block(drafts, f"layer{stage}.{number}", stream, norms)
    for classes in _CLASSES:
        stream.read_by(classes)
        fixed(drafts, f"{classes}.weight", 0, "classes")
    if not any(f"{classes}.weight" in shapes for classes in _CLASSES):
        fix(stream)
    return drafts.finished()


def _block(drafts: Drafts, block: str, stream: Draft, norms: HeadRule | None) -> Draft:
    """The groups of one block; the stream that it adds to, its own where it has a shortcut."""
    shapes, end = drafts.shapes, stream
    for shortcut in _SHORTCUTS:
        numbers = numbers_after(shapes, f"{block}.{shortcut}.")
        parts = [f"{block}.{shortcut}.{number}" for number in numbers]
        conv = next((part for part in parts if len(shapes.get(f"{part}.weight", ())) == 4), None)
        if conv is not None:
            stream.read_by(conv)
            norm = next((part for part in parts if part != conv), "")
            end = _begun(drafts, f"{block}.{shortcut}", conv, norm, norms)
    last = max(numbers_after(shapes, f"{block}.conv"))
    source, width = stream, stream.size
    levels: tuple[str, ...] = ()
    for place in range(1, last + 1):
        conv, norm = f"{block}.conv{place}", f"{block}.bn{place}"
        out, into = shapes[f"{conv}.weight"][:2]
        if into != width and place in (1, last):
            raise RefusedError(
                f"a residual block may have groups of channels inside, but {conv} reads {into} of {width}",
                hint="groups of a module that is none of torchvision's can be derived from it",
            )
        if into != width:
            source, levels = _grouped(drafts, source, conv, norm), (GROUP, MEMBER)
        else:
            source.read_by(conv, levels)
            levels = ()
            if place < last:
                source = _begun(drafts, conv, conv, norm, norms)
            else:
                _normalised(end.made_by(conv), norm, norms)
        width = out
    return end


def _begun(drafts: Drafts, name: str, conv: str, norm: str, norms: HeadRule | None) -> Draft:
    draft = drafts.free(name, drafts.shapes[f"{conv}.weight"][0]).made_by(conv)
    _normalised(draft, norm, norms)
    return draft


def _normalised(draft: Draft, norm: str, norms: HeadRule | None) -> None:
    width = draft.shapes.get(f"{norm}.weight", (0,))[0]
    if norms is not None and width and f"{norm}.running_mean" not in draft.shapes:
        draft.grouped_by(norm, norms.heads(width))
        return
    draft.normalised_by(norm)
    if width and f"{norm}.running_mean" not in draft.shapes:
        fix(draft)


def _grouped(drafts: Drafts, source: Draft, conv: str, norm: str) -> Draft:
    """A grouped convolution: its groups move as wholes, and inside of each the channels that it makes.

    Those that it reads have one order for all groups, since its rows count them alike.
    """
    out, into = drafts.shapes[f"{conv}.weight"][:2]
    count = source.size // into
    known = f"{norm}.running_mean" in drafts.shapes and not source.levels[0].fixed and not source.partitions
    levels = (
        Level(GROUP, count, fixed=not known),
        Level(_INTO, into, fixed=not known),
        Level(MEMBER, out // count, below=(GROUP,), fixed=not known),
    )
    draft = drafts.of_levels(conv, levels)
    for one in source.windows:
        draft.window(one.key, one.axis, (GROUP, _INTO), one.offset)
    drafts.all.remove(source)
    draft.window(f"{conv}.weight", 1, (_INTO,))
    return draft.made_by(conv, (GROUP, MEMBER)).normalised_by(norm, (GROUP, MEMBER))
