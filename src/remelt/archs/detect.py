"""Which arch a file is, and why: judged by a few keys and their shapes, never by the file's name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from remelt.archs.arch import Arch, Sign, Variant, all_archs
from remelt.archs.dialects import IN_FULL, ORIGINAL, Spelling, find_spelled, original_key, spellings_of
from remelt.core.tensor_info import TensorInfo

_ADAPTER_MARK = re.compile(r"\.lora_(?:up|down|A|B)\.|\.(?:lokr_w|hada_w|oft_)")
_VAE_STARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_VAE_PREFIXES = ("first_stage_model.", "vae.")
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


@dataclass(frozen=True)
class _Trial:
    """One alternative of one arch held against the tensors: the signs that hold, in words, and those that do not."""

    arch: Arch
    spelling: Spelling
    holds: tuple[str, ...]
    fails: tuple[str, ...]
    seen: int


def detect(tensors: Mapping[str, TensorInfo]) -> Detection:
    """The arch of a set of tensors, with the evidence. An unknown arch is no error: its blocks are inferred.

    A sign's shape decides by its rank and by sizes that never change (channels of a latent, kernels). Sizes marked
    ``~`` in an arch file decide where the first of them says that the model is of full size, so that a model with the
    same keys and smaller widths is recognised too.
    """
    trials = list(_trials(tensors))
    matching = list({trial.arch.name: trial for trial in trials if not trial.fails}.values())
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
    near = sorted(
        (trial for trial in trials if trial.seen),
        key=lambda trial: (-_shared(trial, tensors), -trial.seen, len(trial.fails)),
    )
    return Detection(None, _miss(tensors, near), near=tuple(dict.fromkeys(trial.arch.name for trial in near)))


def _trials(tensors: Mapping[str, TensorInfo]) -> Iterator[_Trial]:
    """Every alternative of every arch in the spellings in which its first sign is there, other dialects last."""
    matched = False
    for original in (True, False):
        for arch in () if matched else all_archs().values():
            spellings = [one for one in spellings_of(arch) if (one.dialect == ORIGINAL) is original]
            for signs in arch.recognise:
                asked = [sign.key for sign in signs if sign.shape is not None]
                found = [one for one in spellings if find_spelled(arch, one, tensors, asked[0]) is not None]
                if original and not found:  # no match, but perhaps a near miss
                    found = [one for one in spellings if any(find_spelled(arch, one, tensors, key) for key in asked)]
                for spelling in found or spellings[:original]:
                    trial = _try(arch, signs, tensors, spelling)
                    matched |= not trial.fails
                    yield trial


def _shared(trial: _Trial, keys: Collection[str]) -> int:
    """How many of a file's keys are in blocks of an arch, spelled so; of very many, some speak for all."""
    asked = itertools.islice(keys, 0, None, -(-len(keys) // _ASKED))
    return sum(bool(trial.arch.block_of(original_key(trial.arch, trial.spelling, key))) for key in asked)


def _miss(tensors: Mapping[str, TensorInfo], near: list[_Trial]) -> str:
    """What a file is whose keys no arch recognises."""
    if not near:
        adapted = next((key for key in tensors if _ADAPTER_MARK.search(key)), None)
        if adapted is not None:
            return f"no known arch: {adapted} says that this is an adapter (LoRA or the like), not a model"
        if _is_vae(tensors):
            return "no known arch: this is a VAE alone, which several archs share"
        return "no known arch has such keys"
    nearest = near[0].arch
    spelling = near[0].spelling
    known = next((one.note for one in nearest.near if not _try(nearest, one.signs, tensors, spelling).fails), None)
    said = f"{known}; {near[0].fails[0]}" if known is not None else "; ".join(near[0].fails)
    return f"no known arch: nearest is {nearest.name}, but {said}"


def _is_vae(keys: Collection[str]) -> bool:
    if not any(f"{prefix}decoder.conv_in.weight" in keys for prefix in ("", *_VAE_PREFIXES)):
        return False
    bare = {key.removeprefix(next((prefix for prefix in _VAE_PREFIXES if key.startswith(prefix)), "")) for key in keys}
    return all(key.startswith(_VAE_STARTS) for key in bare)


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
