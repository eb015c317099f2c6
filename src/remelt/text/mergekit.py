"""mergekit's configurations: YAML that says a method, models or slices of them, parameters; or a mixture of experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath

from remelt.core.dtype import DType
from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError, RecipeSyntaxError, RemeltError
from remelt.recipe.adapter import adapter
from remelt.recipe.blocks import keys
from remelt.recipe.layers import layers, stack_layers
from remelt.recipe.mixture import RANDOM, UNIFORM, mixture_of_experts
from remelt.recipe.node import Call, Model, Node, Value, parameter
from remelt.recipe.vocabulary import BASE, UNION, align_vocabulary
from remelt.text.configuration import Path, shown
from remelt.text.document import Document
from remelt.text.mergekit_methods import METHODS, Methods, Part
from remelt.text.mergekit_parameters import Scope
from remelt.text.source import SourceText

_TOP = (
    *("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template"),
)
_OF_MIXTURES = (
    *("base_model", "experts", "gate_mode", "experts_per_token", "shared_experts", "architecture"),
    *("dtype", "out_dtype"),
)
_OF_EXPERTS = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
_STYLES = {"mixtral": "mixtral", "qwen moe": "qwen2_moe", "qwen3 moe": "qwen3_moe"}
"""The styles of mixtures by mergekit's names for them, any beginning of which it takes."""
_GATES = ("hidden", "hidden_avg", "hidden_last", "cheap_embed")
_PARAMETERS: Path = ("parameters",)


def looks_like_mergekit(line: str) -> bool:
    """Whether a first line of content begins such a configuration."""
    name, colon, _ = line.partition(":")
    if line.startswith(("---", "%YAML")):
        return True
    return bool(colon) and (name.strip() in (*_TOP, *_OF_MIXTURES) or line.startswith("- "))


def is_named_as_yaml(name: str) -> bool:
    """Whether a file's name says that it is YAML."""
    return PurePath(name).suffix.lower() in (".yml", ".yaml")


def read_mergekit(source: SourceText, first_line: int) -> Document:
    """The recipe that a configuration says; `RecipeSyntaxError` with its place for what it cannot say.

    Raises `MissingExtraError` without the extra ``mergekit``.
    """
    return Document(_Reader(source).recipe(), grammar="mergekit's YAML")


class _Reader(Methods):
    def recipe(self) -> Node:
        if self.at(("experts",)) is not None and self.at(("merge_method",)) is None:
            return self.cast(self.mixture())
        self.known((), _TOP)
        method = self.at(("merge_method",))
        if method is None:
            raise self.source.refuse("a configuration says its merge_method", 1, hint="merge_method: linear")
        if method not in METHODS:
            known = f"those that are read: {', '.join(METHODS)}"
            hint = nearest_hint(str(method), METHODS) or known
            raise self.refuse(
                ("merge_method",), f"the method {shown(method)} is not read from configurations yet", hint
            )
        self.check_parameters((), method)
        if self.at(("modules",)) is not None:
            raise self.refuse(("modules",), "models of several modules are not read", name=True)
        if (self.at(("models",)) is None) == (self.at(("slices",)) is None):
            raise self.source.refuse("a configuration names either models or slices", 1)
        result = self.of_models(method) if self.at(("models",)) is not None else self.of_slices(method)
        return self.cast(self.tokenized(result))

    def cast(self, result: Node) -> Node:
        """The result in the element type that is asked for."""
        name = next((name for name in ("out_dtype", "dtype") if self.at((name,)) is not None), None)
        if name is None:
            return result
        dtype = self.at((name,))
        if not isinstance(dtype, str):
            raise self.refuse((name,), "an element type is a text, such as bfloat16")
        try:
            DType.parse(dtype)
        except RemeltError as error:
            raise self.refuse((name,), error.message, error.hint) from None
        return Call("cast", (result,), (("dtype", Value(dtype)),), span=self.span((name,)))

    def mixture(self) -> Node:
        """A mixture of experts, as mergekit-moe makes it; a router of prompts is a hole for one that is made before."""
        self.known((), _OF_MIXTURES)
        if self.at(("base_model",)) is None:
            raise self.source.refuse("a mixture of experts says its base_model", 1)
        experts = [self.expert(("experts", place)) for place, _ in enumerate(self.listed(("experts",)))]
        shared = self.listed(("shared_experts",)) if self.at(("shared_experts",)) else []
        if len(shared) > 1:
            raise self.refuse(("shared_experts",), "a mixture has one shared expert", name=True)
        mode, per_token = self.at(("gate_mode",)) or _GATES[0], self.at(("experts_per_token",))
        if mode not in (RANDOM, UNIFORM, *_GATES):
            hint = nearest_hint(str(mode), (RANDOM, UNIFORM, *_GATES))
            raise self.refuse(("gate_mode",), f"{shown(mode)} is no way to make a router", hint)
        try:
            made = mixture_of_experts(
                *(self.model(("base_model",)), *experts),
                experts_per_token=2 if per_token is None else per_token,
                router=parameter("router") if mode in _GATES else mode,
                style=self.style(shared=bool(shared)),
                shared=self.expert(("shared_experts", 0)) if shared else None,
            )
        except RecipeSyntaxError:
            raise
        except RecipeError as error:
            place: Path = ("experts",) if per_token is None else ("experts_per_token",)
            raise self.refuse(place, error.message, error.hint, name=True) from None
        return replace(made, span=self.span(("experts",), name=True))

    def expert(self, path: Path) -> Node:
        """An expert's model, with noise and with its last matrices scaled where that is asked for."""
        self.known(path, _OF_EXPERTS)
        found, _ = self.reference((*path, "source_model"))
        noise, scale = (self.plain((*path, name)) for name in _OF_EXPERTS[3:])
        if noise is not None:
            found = Call("add_noise", (found,), (("alpha", Value(noise)),), span=self.span(path))
        if scale is not None:
            last = keys({"*.down_proj.weight": scale, "*.w2.weight": scale}, optional=True)
            found = Call("passthrough", (found,), (("scale", Value(last | 1.0)),), span=self.span(path))
        return found

    def plain(self, path: Path) -> float | None:
        """A number, or None where nothing is said."""
        found = self.at(path)
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
            raise self.refuse(path, f"a number is due here, but got {shown(found)}")
        return float(found)

    def style(self, *, shared: bool) -> str | None:
        """The style that is asked for, or that has a shared expert; None where the base's kind decides."""
        told = self.at(("architecture",))
        found = [style for name, style in _STYLES.items() if told and name.startswith(str(told).lower())]
        if told and not found:
            hint = f"those that are: {', '.join(_STYLES)}"
            raise self.refuse(("architecture",), f"mixtures of the kind {shown(told)} are not made", hint)
        if len(found) == 1:
            return found[0]
        return "qwen2_moe" if shared else None

    def tokenized(self, result: Node) -> Node:
        """The result with the vocabulary that is asked for: the base's, that of all, or a model's."""
        if self.at(("chat_template",)) not in (None, "auto"):
            message = "chat templates are not put into the result: it has that of its tokenizer's model"
            raise self.refuse(("chat_template",), message, "leave it out, and edit the result's tokenizer", name=True)
        path: Path = ("tokenizer_source",)
        if self.at(("tokenizer",)) is not None:
            if self.at(path) is not None:
                raise self.refuse(path, "a tokenizer is told once", name=True)
            self.known(("tokenizer",), ("source", "pad_to_multiple_of"))
            path = ("tokenizer", "source")
        multiple = self.at(("tokenizer", "pad_to_multiple_of"))
        wanted = UNION if self.at(path) is None and self.at(("tokenizer",)) is not None else self.at(path)
        if wanted is None:
            return result
        if multiple is not None and (type(multiple) is not int or multiple < 1):
            raise self.refuse(("tokenizer", "pad_to_multiple_of"), "rows are padded to a multiple of a whole number")
        base = self.base(("base_model",))
        order = wanted if wanted in (BASE, UNION) else self.model(path)
        aligned = align_vocabulary(result, base=base, order=order, pad_to_multiple_of=multiple)
        return replace(aligned, span=self.span(path if self.at(path) is not None else ("tokenizer",)))

    def of_models(self, method: str) -> Node:
        parts = []
        for place, _ in enumerate(self.listed(("models",))):
            path: Path = ("models", place)
            self.known(path, ("model", "parameters"))
            self.check_parameters(path, method, of_model=True)
            model, name = self.reference((*path, "model"))
            parts.append(Part(model, name, path, ((*path, "parameters"), _PARAMETERS)))
        base = self.base(("base_model",))
        if base is not None and base.name not in [part.name for part in parts]:
            parts.append(Part(base, base.name, ("base_model",), (_PARAMETERS,)))
        return self.merged(method, parts, base, Scope((_PARAMETERS,)))

    def of_slices(self, method: str) -> Node:
        slices = []
        offset = 0
        for place, _ in enumerate(self.listed(("slices",))):
            path: Path = ("slices", place)
            self.known(path, ("sources", "base_model", "parameters", "residual_weight"))
            self.check_parameters(path, method)
            if self.at((*path, "residual_weight")) is not None:
                raise self.refuse((*path, "residual_weight"), "residual weights are not read", name=True)
            ranges = [self.range((*path, "sources", one)) for one, _ in enumerate(self.listed((*path, "sources")))]
            lengths = {stop - start for start, stop in ranges}
            if len(lengths) > 1:
                raise self.refuse((*path, "sources"), "the sources of a slice have as many layers each")
            slices.append((path, ranges, offset))
            offset += lengths.pop()
        self.count = offset
        stack = stack_layers(*(self.slice(method, path, ranges, begin) for path, ranges, begin in slices))
        return replace(stack, span=self.span(("slices",), name=True))

    def slice(self, method: str, path: Path, ranges: Sequence[tuple[int, int]], offset: int) -> Node:
        shared = ((*path, "parameters"), _PARAMETERS)
        parts = []
        for place, (start, stop) in enumerate(ranges):
            here: Path = (*path, "sources", place)
            self.known(here, ("model", "layer_range", "parameters"))
            self.check_parameters(here, method, of_model=True)
            model = self.model((*here, "model"))
            read = replace(layers(model, start, stop), span=self.span((*here, "layer_range")))
            parts.append(Part(read, model.name, here, ((*here, "parameters"), *shared)))
        own = self.base((*path, "base_model"))
        base = self.base(("base_model",)) if own is None else own
        return self.merged(method, parts, base, Scope(shared, offset, ranges[0][1] - ranges[0][0]))

    def range(self, path: Path) -> tuple[int, int]:
        found = self.at((*path, "layer_range"))
        whole = isinstance(found, list) and len(found) == 2 and all(type(number) is int for number in found)
        if not whole or not 0 <= found[0] < found[1]:
            raise self.refuse((*path, "layer_range"), "a range of layers is two whole numbers, the first one less")
        return found[0], found[1]

    def base(self, path: Path) -> Model | None:
        return None if self.at(path) is None else self.model(path)

    def reference(self, path: Path) -> tuple[Node, str]:
        """A model, with an adapter in full where one is said, and the model's name."""
        told = self.at(path)
        if isinstance(told, dict) and told.get("lora") is not None:
            whole, lora = self.model((*path, "model")), self.model((*path, "lora"))
        elif isinstance(told, str) and "+" in told:
            first, _, second = told.partition("+")
            if not first or not second.partition("@")[0]:
                raise self.refuse(path, "a model with an adapter is written model+adapter")
            whole = Model(first.partition("@")[0], span=self.span(path))
            lora = Model(second.partition("@")[0], span=self.span(path))
        else:
            found = self.model(path)
            return found, found.name
        return whole + adapter(lora), whole.name

    def model(self, path: Path) -> Model:
        """A model by its name; what follows an ``@`` is a revision, which a folder has not."""
        told = self.at(path)
        inner = told.get("model", told) if isinstance(told, dict) else told
        found = inner.get("path") if isinstance(inner, dict) else inner
        if not isinstance(found, str) or not found.partition("@")[0] or "\0" in found:
            raise self.refuse(path, "a model is a path or a name")
        if "+" in found or self.at((*path, "lora")) is not None:
            hint = "merge it into its model first, or write a recipe: model + adapter"
            raise self.refuse(path, "an adapter may stand beside one of the models, not here", hint)
        return Model(found.partition("@")[0], span=self.span(path))
