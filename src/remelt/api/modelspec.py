"""What sites and interfaces read of a model: metadata of the ModelSpec standard, carried over or written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath

from remelt.archs.configurations import Use
from remelt.archs.dialects import ORIGINAL
from remelt.check.inputs import Input
from remelt.core.checksum import HASH_PLACEHOLDER
from remelt.core.nearest import nearest_hint
from remelt.errors import OptionError

PREFIX = "modelspec."
VERSION = "1.0.1"
_TRUE_OF_FIRST = ("architecture", "resolution", "prediction_type", "timestep_range", "encoder_layer")
"""What is true of a merge as of its first model."""
_OF_FILES = ("implementation", "implementation_version")
"""What is true of files of the same layout."""
_OF_ALL = ("author", "license", "tags", "usage_hint", "trigger_phrase")
"""What is told of a merge as of all its models, each once."""
_OF_FIRST_TOLD = ("description", "category")
"""What is told of a merge as of the first model that tells it."""
_OF_ONE = ("date", "merged_from")
"""What is told of a result that is made of one model alone, as a conversion is."""
_NEW = ("title", "merged_from", "sai_model_spec", "hash_sha256")
"""What is written anew."""
_KNOWN = {*_TRUE_OF_FIRST, *_OF_FILES, *_OF_ALL, *_OF_FIRST_TOLD, *_OF_ONE, *_NEW, "thumbnail"}
_VELOCITY = "v_pred"
"""The tensor that marks a model of v-prediction."""
_SHOWN = 3


def model_spec(
    inputs: Sequence[Input],
    markers: Collection[str],
    dialect: str = ORIGINAL,
    *,
    title: str | None = None,
    asked: Mapping[str, str] | None = None,
    hashed: bool = False,
) -> dict[str, str]:
    """The metadata of a result of these models in a dialect; the first model's arch and use are the result's.

    ``markers`` are the result's keys, and those of its models for which the dialect has no place. What is ``asked`` for
    goes before what the models tell; an empty text leaves an entry out. Where it is to be ``hashed``, it has a place
    for the SHA-256 of what follows the header, as the standard asks.

    Empty where neither the arch file nor the first model's metadata tells an architecture.
    """
    if not inputs:
        return {}
    arch, told = inputs[0].detection.arch, [_told(one.checkpoint.metadata) for one in inputs]
    found = {} if arch is None else dict(arch.modelspec)
    if dialect != ORIGINAL and found:
        found["implementation"] = dialect
    kept = _TRUE_OF_FIRST if inputs[0].detection.spelling.dialect != dialect else (*_TRUE_OF_FIRST, *_OF_FILES)
    found |= {name: told[0][name] for name in kept if name in told[0]}
    if "architecture" not in found:
        return {}
    if "prediction_type" not in found and _VELOCITY in markers:
        found["prediction_type"] = "v"
    titles = list(dict.fromkeys(map(_title, inputs)))
    more = f" and {len(titles) - _SHOWN} more" if len(titles) > _SHOWN else ""
    found["title"] = title or " + ".join(titles[:_SHOWN]) + more
    found |= _carried(told)
    if len(titles) > 1:
        found["merged_from"] = ", ".join(map(_quoted, titles))
    found |= asked or {}
    if hashed:
        found["hash_sha256"] = f"0x{HASH_PLACEHOLDER}"
    return {PREFIX + name: text for name, text in {"sai_model_spec": VERSION, **found}.items() if text}


def use_of(inputs: Sequence[Input], markers: Collection[str], asked: Mapping[str, str] | None = None) -> Use:
    """What is known of a result beside its weights: what it predicts, and the width of its images.

    As it is ``asked`` for, or as the first model tells it, or, of the prediction, as a marker does.
    """
    told = {**(_told(inputs[0].checkpoint.metadata) if inputs else {}), **(asked or {})}
    width = told.get("resolution", "").partition("x")[0].strip()
    prediction = told.get("prediction_type") or ("v" if _VELOCITY in markers else "")
    return Use(prediction, int(width) if width.isascii() and width.isdecimal() and len(width) < 6 else 0, markers)


def refuse_entries(asked: Mapping[str, str]) -> None:
    """Refuse what the standard does not name, what is written anew, and what is no text; `OptionError` tells which."""
    known = sorted(_KNOWN - {*_NEW})
    for name, text in asked.items():
        if name in _NEW:
            hint = {"title": "title names the result", "hash_sha256": "hashed has it written"}.get(name)
            raise OptionError(f"the ModelSpec entry {name!r} is written anew for every result", hint=hint)
        if name not in known:
            hint = nearest_hint(name, known) or f"it has {', '.join(known)}"
            raise OptionError(f"the ModelSpec standard has no entry {name!r}", hint=hint)
        if not isinstance(text, str):
            raise OptionError(f"the ModelSpec entry {name!r} is a text, but got {text!r}")


def _carried(told: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """What people wrote of the models, and is told of the result."""
    for name in _OF_ALL:
        parted = _tags if name == "tags" else _whole
        texts = dict.fromkeys(text for one in told if one.get(name) for text in parted(one[name]))
        yield name, ", ".join(texts)
    for name in _OF_FIRST_TOLD:
        yield name, next((one[name] for one in told if one.get(name)), "")
    if len(told) == 1:
        yield from ((name, told[0].get(name, "")) for name in _OF_ONE)


def _tags(text: str) -> Iterable[str]:
    return (tag.strip() for tag in text.split(",") if tag.strip())


def _whole(text: str) -> Iterable[str]:
    return (text,)


def _told(metadata: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(PREFIX): text for name, text in metadata.items() if name.startswith(PREFIX)}


def _title(given: Input) -> str:
    """What a model is called: by its metadata, or by its file."""
    return _told(given.checkpoint.metadata).get("title") or PurePath(given.label).stem


def _quoted(title: str) -> str:
    """A title in a list with commas: quoted as in CSV where it has some itself.

    >>> print(_quoted("plain"), _quoted("Ghost, mixed"), sep=", ")
    plain, "Ghost, mixed"
    """
    if not any(sign in title for sign in ',"\n'):
        return title
    return '"' + title.replace('"', '""') + '"'
