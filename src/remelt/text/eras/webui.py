"""What AUTOMATIC1111's web UI and its SuperMerger write into a merged file: how it was made, as far as they tell."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from remelt.errors import RecipeError
from remelt.recipe.blocks import PRESET, BlockWeights, Rule
from remelt.recipe.node import Call, Literal, Model, Node, Value

RECIPE, MODELS = "sd_merge_recipe", "sd_merge_models"
_SUPERMERGER = "sd-webui-supermerger"
_AGAIN = "merge anew from the models that it names"


def recipe_of_web_ui(metadata: Mapping[str, str], name: str) -> Node:
    """The recipe that a merged file's metadata says, its models locked to their contents where they are told.

    Raises `RecipeError` where it leaves out what the merge depended on.
    """
    told, models = (_read(metadata.get(key, "{}"), key, name) for key in (RECIPE, MODELS))
    maker = _SuperMerger if told.get("type") == _SUPERMERGER else _WebUi
    return maker(told, models, name).recipe()


def _read(text: str, key: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RecipeError(f"{name}: its metadata has a {key} that is no JSON object")
    return found


class _Maker:
    def __init__(self, told: Mapping[str, Any], models: Mapping[str, Any], name: str) -> None:
        self.told, self.models, self.name = told, models, name

    def refuse(self, why: str) -> RecipeError:
        return RecipeError(f"{self.name}: the recipe in its metadata is not complete: {why}", hint=_AGAIN)

    def model(self, place: str) -> Model:
        """A model by the hash that the recipe tells, under the name that stands beside it."""
        digest = self.told.get(place)
        if not isinstance(digest, str) or not digest:
            raise self.refuse(f"it names no {place.replace('_hash', '').replace('_', ' ')}")
        entry = self.models.get(digest)
        found = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(found, str) or not found:
            if _is_sha256(digest):
                raise self.refuse(f"the model with the hash {digest[:10]} has no name in {MODELS}")
            found = digest
        found = found.rsplit(" [", 1)[0] if found.endswith("]") else found
        return Model(found.replace("\\", "/"), sha256=digest.lower() if _is_sha256(digest) else None)

    def number(self, place: str) -> float:
        value = self.told.get(place)
        number = _finite(value)
        if number is None:
            raise self.refuse(f"{place} is {value!r:.40}, and no number")
        return number


class _WebUi(_Maker):
    """The checkpoint merger of the web UI itself."""

    def recipe(self) -> Node:
        method = str(self.told.get("interp_method"))
        if self.told.get("type") != "webui":
            raise self.refuse(f"it was made by {self.told.get('type')!r}, which is not known")
        if self.told.get("bake_in_vae") not in (None, "", "None"):
            raise self.refuse(
                f"the VAE of {self.told['bake_in_vae']!r} was put in, a file that it does not tell the hash of"
            )
        if self.told.get("discard_weights"):
            raise self.refuse(f"keys that fit {self.told['discard_weights']!r} were left out")
        if self.told.get("is_inpainting") or self.told.get("is_instruct_pix2pix"):
            raise self.refuse("the first convolution of an inpainting or editing model was merged in part")
        a = self.model("primary_model_hash")
        if method == "No interpolation":
            return self.rounded(a)
        b = self.model("secondary_model_hash")
        alpha = (("alpha", Value(self.number("multiplier"))),)
        if method == "Weighted sum":
            return self.rounded(Call("weighted_sum", (a, b), alpha))
        if method == "Add difference":
            difference = Call("subtract", (b, self.model("tertiary_model_hash")))
            return self.rounded(Call("add_difference", (a, difference), alpha))
        raise self.refuse(f"its method {method!r} is not known")

    def rounded(self, node: Node) -> Node:
        """The result in float16 where it was saved as half."""
        return Call("cast", (node,), (("dtype", Value("fp16")),)) if self.told.get("save_as_half") is True else node


class _SuperMerger(_Maker):
    """The extension SuperMerger, as far as it is arithmetic on whole models or blocks."""

    def recipe(self) -> Node:
        mode = str(self.told.get("mode"))
        if self.told.get("calcmode", "normal") != "normal":
            raise self.refuse(f"its calculation {self.told['calcmode']!r} is not known")
        if self.told.get("elemental_merge"):
            raise self.refuse("elements were merged with weights of their own")
        for kind in ("Include", "Exclude", "include", "exclude"):
            if any(self.told.get(kind) or []):
                raise self.refuse(f"blocks or elements were chosen ({kind})")
        a, b = self.model("model_a"), self.model("model_b")
        alpha = self.weights("alpha")
        if mode.startswith("Weight"):
            return Call("weighted_sum", (a, b), (("alpha", Value(alpha)),))
        c = self.model("model_c")
        if mode.startswith("Add"):
            return Call("add_difference", (a, Call("subtract", (b, c))), (("alpha", Value(alpha)),))
        beta = self.weights("beta")
        if "Twice" in mode:
            first = Call("weighted_sum", (a, b), (("alpha", Value(alpha)),))
            return Call("weighted_sum", (first, c), (("alpha", Value(beta)),))
        if "Triple" in mode:
            shares = (self.rest(alpha, beta), alpha, beta)
            parts = [Call("scale", (one,), (("alpha", Value(w)),)) for one, w in zip((a, b, c), shares, strict=True)]
            return Call("add", (Call("add", (parts[0], parts[1])), parts[2]))
        raise self.refuse(f"its mode {mode!r} is not known")

    def weights(self, which: str) -> BlockWeights | float:
        """The weight, or those of the blocks after that of everything else."""
        base = self.number(f"base_{which}")
        if not self.told.get("mbw"):
            return base
        found = self.told.get(f"weights_{which}")
        if isinstance(found, str):
            found = [_float(part) for part in found.split(",")]
        told = found if isinstance(found, list) else [None]
        numbers = [number for number in map(_finite, told) if number is not None]
        if len(numbers) < len(told):
            raise self.refuse(f"weights_{which} are no numbers")
        if len(numbers) == 26:
            base, *numbers = numbers
        if len(numbers) != 25:
            raise self.refuse(
                f"it has {len(numbers)} weights by block, of which only the 25 of Stable Diffusion 1 are known"
            )
        return BlockWeights((Rule(PRESET, listed=(base, *numbers)),))

    def rest(self, alpha: BlockWeights | float, beta: BlockWeights | float) -> Literal:
        """What is left for the first of three models."""
        if isinstance(alpha, BlockWeights) and isinstance(beta, BlockWeights):
            pairs = zip(alpha.rules[0].listed, beta.rules[0].listed, strict=True)
            return BlockWeights((Rule(PRESET, listed=tuple(1.0 - a - b for a, b in pairs)),))  # type: ignore[operator]
        assert isinstance(alpha, float)
        assert isinstance(beta, float)
        return 1.0 - alpha - beta


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and all(char in "0123456789abcdef" for char in text.lower())


def _finite(value: object) -> float | None:
    """A number of JSON, unless it is too large for one here."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
