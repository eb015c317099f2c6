"""Which arch a file is, and why: judged by a few keys and their shapes, never by the file's name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from remelt.archs.arch import Arch, Sign, Variant, all_archs
from remelt.archs.dialects import (
    IN_FULL,
    ORIGINAL,
    Spelling,
    find_spelled,
    holds,
    original_key,
    spellings_of,
    starts_of,
)
from remelt.core.tensor_info import TensorInfo

_NO_MODELS = {
    "an adapter (LoRA or the like), not a model": re.compile(
        r"\.lora_(?:up|down|mid|A|B|embedding_[AB])\b|\.lora(?:_linear_layer)?\.(?:up|down)\.|_lora[12]?\.(?:up|down)\."
        r"|\.(?:lokr_w[12]|hada_w[12]|oft_|boft_|ia3_l|a1\.weight|b1\.weight|on_input)"
    ),
    "a ControlNet, which stands beside a model and is merged with its own kind only": re.compile(
        r"^(?:module\.)?(?:control_model\.|zero_convs\.|input_hint_block\.|lllite_|controlnet_)"
        r"|\.controlnet_(?:cond_embedding|(?:down_|mid_|single_)?blocks?)\."
    ),
}
"""What other files of this field are, by a pattern in one of their keys."""
_WORDS = re.compile(r"emb_params|clip_[lg]|t5xxl|string_to_(?:param|token)\..*|<[^.]*>")
"""What the tensors of embeddings of textual inversion are called: by their trainers, or as the word itself."""
_WORD_WIDTHS = (768, 1024, 1280, 4096)
"""Widths of the embeddings of the text encoders for which people train words."""
_MOST_WORDS = 8
_READ = 5000
"""How many keys of a file of no known arch are looked at for such patterns: such files have fewer."""
_BESIDE = 2
"""How many keys may stand beside those that share a beginning."""
_ASKED = 500
"""How many keys of a file of no known arch are held against the archs that came close."""


@dataclass(frozen=True)
class Detection:
    """The arch of a set of tensors (None where no known one fits), and why.

    ``evidence`` names the keys and shapes that decided, or the nearest miss; ``problem`` is set where it cannot be one
    arch; ``near`` are the archs that came close, best first; ``variants`` the ways in which the model is special.
    """

    arch: Arch | None
    evidence: str
    problem: str | None = None
    near: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    spelling: Spelling = IN_FULL
    """How its keys are spelled."""
    holders: tuple[str, ...] = ()
    """Where all keys begin with a name: the components of other archs whose keys begin so, as ``vae of sd1``."""

    @property
    def note(self) -> str | None:
        """What is special about the file, in words: what stands before its keys, and its variants."""
        notes = [variant.note for variant in self.variants]
        if self.spelling.start:
            others = f", as those of {', '.join(self.holders)} do" if self.holders else ""
            notes.insert(0, f"its keys begin with {self.spelling.start}{others}")
        return "; ".join(notes) or None


@dataclass(frozen=True)
class _Trial:
    """One alternative of one arch held against the tensors: the signs that hold, in words, and those that do not."""

    arch: Arch
    spelling: Spelling
    holds: tuple[str, ...]
    fails: tuple[str, ...]
    seen: int


def detect(tensors: Mapping[str, TensorInfo], stated: str | None = None) -> Detection:
    """The arch of a set of tensors, with the evidence. An unknown arch is no error: its blocks are inferred.

    A sign's shape decides by its rank and by sizes that never change (channels of a latent, kernels). Sizes marked
    ``~`` in an arch file decide where the first of them says that the model is of full size, so that a model with the
    same keys and smaller widths is recognised too. What no arch has as it is may be below a name that all keys begin
    with, as trainers and whole checkpoints write it. Of several archs that fit, the ``stated`` one is meant.
    """
    found = _detect(tensors, stated)
    if found.arch is None and found.problem is None:
        for start in starts_of(tensors, _BESIDE):
            inside = {key.removeprefix(start): info for key, info in tensors.items()}
            below = _detect(inside, stated)
            if below.arch is not None and len(inside) == len(tensors):
                spelling = replace(below.spelling, start=start)
                return replace(below, spelling=spelling, holders=tuple(_holders(tensors, start)))
    return found


def _detect(tensors: Mapping[str, TensorInfo], stated: str | None) -> Detection:
    """The arch of tensors by their keys as they are."""
    trials = list(_trials(tensors))
    matching = list({trial.arch.name: trial for trial in trials if not trial.fails}.values())
    matching = [trial for trial in matching if trial.arch.name == stated] or matching
    if len(matching) == 1:
        arch, spelling = matching[0].arch, matching[0].spelling
        return Detection(
            arch,
            f"{arch.name}: {'; '.join(matching[0].holds)}",
            variants=tuple(one for one in arch.variants if not _try(arch, one.signs, tensors, spelling).fails),
            spelling=spelling,
        )
    if matching:
        names = [trial.arch.name for trial in matching]
        evidence = "; ".join(f"{trial.arch.name}: {trial.holds[0]}" for trial in matching)
        return Detection(None, evidence, f"it looks like {' and like '.join(names)} at once", tuple(names))
    order = {name: place for place, name in enumerate(all_archs())}
    near = sorted(
        (trial for trial in trials if trial.seen),
        key=lambda trial: (-_shared(trial, tensors), -trial.seen, len(trial.fails), order[trial.arch.name]),
    )
    return Detection(None, _miss(tensors, near), near=tuple(dict.fromkeys(trial.arch.name for trial in near)))


def _trials(tensors: Mapping[str, TensorInfo]) -> Iterator[_Trial]:
    """Every alternative of every arch in the spellings in which its first sign is there, other dialects last.

    Where nothing matches, also those in which any sign is there: they are near misses.
    """
    matched = False
    for original, near in ((True, False), (False, False), (True, True), (False, True)):
        for arch in () if matched else all_archs().values():
            spellings = [one for one in spellings_of(arch) if (one.dialect == ORIGINAL) is original]
            for signs in arch.recognise:
                first, *others = [sign.key for sign in signs if sign.shape is not None]
                found = [one for one in spellings if find_spelled(arch, one, tensors, first) is not None]
                if near:  # those with the first sign are tried already
                    more = (one for one in spellings if one not in found)
                    found = [one for one in more if any(find_spelled(arch, one, tensors, key) for key in others)]
                for spelling in found:
                    trial = _try(arch, signs, tensors, spelling)
                    matched |= not trial.fails
                    yield trial


def _shared(trial: _Trial, keys: Collection[str]) -> int:
    """How many of a file's keys are in blocks of an arch, spelled so; of very many, some speak for all."""
    asked = itertools.islice(keys, 0, None, -(-len(keys) // _ASKED))
    return sum(bool(trial.arch.block_of(original_key(trial.arch, trial.spelling, key))) for key in asked)


def _miss(tensors: Mapping[str, TensorInfo], near: list[_Trial]) -> str:
    """What a file is whose keys no arch recognises."""
    known = _no_model(tensors)
    if known is not None:
        return f"no known arch: {known}"
    if not near:
        return "no known arch has such keys"
    nearest = near[0].arch
    spelling = near[0].spelling
    known = next((one.note for one in nearest.near if not _try(nearest, one.signs, tensors, spelling).fails), None)
    said = f"{known}; {near[0].fails[0]}" if known is not None else "; ".join(near[0].fails)
    return f"no known arch: nearest is {nearest.name}, but {said}"


def _no_model(tensors: Mapping[str, TensorInfo]) -> str | None:
    """What a file is that belongs to a model and is none; None where it is nothing that is known."""
    averages = dict.fromkeys(arch.shadow.prefix for arch in all_archs().values() if arch.shadow is not None)
    for prefix in averages if tensors else ():
        if all(key.startswith(prefix) for key in tensors):
            return f"all its keys begin with {prefix}: these are moving averages without the model that they are of"
    for what, pattern in _NO_MODELS.items():
        told = next((key for key in itertools.islice(tensors, _READ) if pattern.search(key)), None)
        if told is not None:
            return f"{told} says that this is {what}"
    for key, info in tensors.items() if len(tensors) <= _MOST_WORDS else ():
        if _WORDS.fullmatch(key):
            return f"{key} says that this is an embedding of textual inversion, not a model"
        alone = len(tensors) == 1 and "." not in key
        if alone and len(info.shape) in (1, 2) and info.shape[-1] in _WORD_WIDTHS:
            return f"{key} is {list(info.shape)} and alone, as an embedding of textual inversion is"
    return None


def _holders(keys: Collection[str], start: str) -> Iterator[str]:
    """The components of archs whose keys begin so, as far as their layouts tell."""
    inside = [key for key in itertools.islice(keys, _ASKED) if key.startswith(start)]
    for arch in all_archs().values():
        names = {component.name for component in arch.components if holds(component, inside)}
        yield from (f"{name} of {arch.name}" for name in sorted(names) if not arch.part)


def _try(arch: Arch, signs: Iterable[Sign], tensors: Mapping[str, TensorInfo], spelling: Spelling) -> _Trial:
    holds: list[str] = []
    fails: list[str] = []
    seen = 0
    scaled: bool | None = None
    for sign in signs:
        info = find_spelled(arch, spelling, tensors, sign.key)
        if sign.shape is None:
            (fails if info is not None else holds).append(
                f"{sign.key} is {'there' if info is not None else 'not there'}"
            )
            continue
        if info is None:
            fails.append(f"{sign.key} is not there")
            continue
        seen += 1
        ranks_agree = len(info.shape) == len(sign.shape)
        if scaled is None and ranks_agree:
            pairs = ((dim, size) for dim, size in zip(sign.shape, info.shape, strict=True) if dim.full)
            scaled = next((size not in dim.full and size < max(dim.full) for dim, size in pairs), None)
        fits = ranks_agree and all(
            dim.fits(size, scaled=scaled is True) for dim, size in zip(sign.shape, info.shape, strict=True)
        )
        found = f"{sign.key} is {list(info.shape)}"
        if fits:
            holds.append(found)
        else:
            fails.append(f"{found}, expected [{', '.join(map(str, sign.shape))}]")
    return _Trial(arch, spelling, tuple(holds), tuple(fails), seen)
