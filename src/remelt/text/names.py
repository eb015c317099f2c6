"""Names for the steps of a recipe that is written as text."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable

from remelt.recipe.node import Model, Node, Parameter, Value
from remelt.text.literals import is_word

_LONGEST = 40
_SUFFIXES = re.compile(r"(?:\.(?:safetensors|ckpt|pth?|bin))?(?:\.index\.json)?$", re.IGNORECASE)
_SEPARATORS = re.compile(r"[\\/]")


class Names:
    """Gives every step another name; those of models and parameters are made from theirs."""

    def __init__(self, reserved: Iterable[str]) -> None:
        self.taken = {"version", *reserved}
        self.counts: dict[str, int] = {}

    def of(self, node: Node) -> str:
        """A name for a node."""
        if isinstance(node, Model):
            return self.unique(self.of_model(node.name))
        if isinstance(node, Parameter):
            return self.unique(node.name)
        word = "value" if isinstance(node, Value) else "step"
        return self.counted(word, first=1)

    def of_model(self, name: str) -> str:
        """The file's name without its suffix; the folder's where that would be a word of recipes.

        >>> Names([]).of_model("models/v1-5-pruned.safetensors"), Names(["model"]).of_model("sdxl/model.safetensors")
        ('v1_5_pruned', 'sdxl')
        """
        parts = [_word(_SUFFIXES.sub("", part)) for part in _SEPARATORS.split(name) if part]
        words = [part for part in parts[::-1] if part] or ["model"]
        word = next((word for word in words[:2] if word not in self.taken), words[0])
        return word if word[0] not in "0123456789" else f"model_{word}"

    def given(self, wanted: str) -> str:
        """The name that a person gave, as it is where it can be."""
        if wanted in self.taken or not is_word(wanted):
            return self.unique(wanted)
        self.taken.add(wanted)
        return wanted

    def unique(self, wanted: str) -> str:
        """The wanted name, made a word if it is none, with a number if it is taken."""
        word = _word(wanted) or "step"
        if word[0] in "0123456789":
            word = f"step_{word}"
        if word in self.taken or keyword.iskeyword(word):
            return self.counted(f"{word}_", first=2)
        self.taken.add(word)
        return word

    def counted(self, word: str, first: int) -> str:
        """The word with the next number that makes it free."""
        number = self.counts.get(word, first)
        while (name := f"{word}{number}") in self.taken:
            number += 1
        self.counts[word] = number + 1
        self.taken.add(name)
        return name


def _word(text: str) -> str:
    return re.sub(r"\W+", "_", text, flags=re.ASCII)[:_LONGEST].strip("_")
