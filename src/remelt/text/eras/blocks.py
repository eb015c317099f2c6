"""Weights by U-Net block as version 0.1.0 tells them: which keys its blocks have, where today's have others.

There ``BASE`` has the embeddings of time and label and the moving averages, and SDXL's VAE is a block of its own. Today
the embeddings go with the first block, averages with what they are of, and the VAE with ``BASE``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError
from remelt.recipe.blocks import BLOCKS, KEYS, PRESET, BlockWeights, Rule, plain_weights

_TIME, _LABEL = "model.diffusion_model.time_embed.*", "model.diffusion_model.label_emb.*"
_AVERAGES, _VAE = "model_ema.*", "first_stage_model.*"


@dataclass(frozen=True)
class BlockConfig:
    """How version 0.1.0 tells weights by U-Net block: a dict of a config, made weights of keys by a conversion."""

    config: str
    conversion: str
    depth: int
    """Blocks on each side of the middle."""
    has_vae: bool

    @property
    def unet(self) -> tuple[str, ...]:
        """The blocks of the U-Net."""
        sides = [tuple(f"{side}{i:02d}" for i in range(self.depth)) for side in ("IN", "OUT")]
        return (*sides[0], "M00", *sides[1])

    @property
    def blocks(self) -> tuple[str, ...]:
        """All its blocks."""
        return ("BASE", *self.unet, *(("VAE",) if self.has_vae else ()))

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Patterns of keys that feed every block."""
        return (_TIME, _LABEL) if self.has_vae else (_TIME,)


BLOCK_CONFIGS = {
    "sd1": BlockConfig("sd1-supermerger_blocks", "convert_sd1_blocks_to_ldm", 12, False),
    "sdxl": BlockConfig("sdxl-supermerger_blocks", "convert_sdxl_blocks_to_sgm", 9, True),
}


@dataclass(frozen=True)
class BlockNumbers:
    """Numbers by block of a config, of which some may be missing."""

    config: BlockConfig
    numbers: Mapping[str, float]

    def __post_init__(self) -> None:
        for name in self.numbers:
            if name not in self.config.blocks:
                hint = (
                    nearest_hint(name, self.config.blocks)
                    or f"BASE, {self.config.blocks[1]} to {self.config.blocks[-1]}"
                )
                raise RecipeError(f"{name!r} is no block of {self.config.config}", hint=hint)

    def weights(self, default: float | None = None) -> BlockWeights:
        """Today's weights, completed by a number.

        Raises `RecipeError` where some blocks have no number: there, the keys of such blocks are left out.
        """
        missing = [name for name in self.config.blocks if name not in self.numbers]
        if missing and default is None:
            raise RecipeError(
                f"these weights say nothing of {', '.join(missing[:3])}{', ...' if missing[3:] else ''}",
                hint='complete them: merge "fallback" &N 0.5, or weights | 0.5',
            )

        def number(name: str) -> float:
            weight = self.numbers.get(name, default)
            assert weight is not None
            return weight

        base = number("BASE")
        keys: dict[str, float] = {}
        if number("IN00") != base:
            keys |= dict.fromkeys(self.config.embeddings, base)
        if any(number(name) != base for name in self.config.unet):
            keys[_AVERAGES] = base
        if self.config.has_vae and number("VAE") != base:
            keys[_VAE] = number("VAE")
        plain = tuple((name, float(weight)) for name, weight in self.numbers.items() if name != "VAE")
        rules = (Rule(KEYS, named=tuple(keys.items()), optional=True),) if keys else ()
        return BlockWeights((*rules, *((Rule(BLOCKS, named=plain),) if plain else ())), default)


def block_numbers(weights: BlockWeights, arch: str) -> tuple[dict[str, float], float | None]:
    """Today's weights as numbers by the blocks of version 0.1.0, in their order, and the number for the rest.

    Raises `RecipeError` with the reason where its blocks cannot say them.
    """
    told = BLOCK_CONFIGS[arch]
    keys: dict[str, float] = {}
    blocks: dict[str, float] = {}
    for rule in weights.rules:
        if rule.kind == KEYS and rule.optional and all(glob in _patterns(told) for glob, _ in rule.named):
            for glob, weight in rule.named:
                keys.setdefault(glob, _number(weight))
            continue
        for name, number in _by_name(rule, told):
            blocks.setdefault(name, _number(number))
    default = None if weights.default is None else _number(weights.default)

    def today(name: str) -> float:
        weight = blocks.get(name, default)
        if weight is None:
            raise RecipeError("nothing stands for the other blocks there", hint="complete them, as in ... | 0.5")
        return weight

    base = today("BASE")
    odd = [glob for glob in told.embeddings if keys.get(glob, today("IN00")) != base]
    averaged = [keys[_AVERAGES]] if _AVERAGES in keys else [today(name) for name in told.unet]
    if any(weight != base for weight in averaged):
        odd.append(_AVERAGES)
    vae = keys.get(_VAE, base)
    if not told.has_vae and vae != base:
        odd.append(_VAE)
    if odd:
        shown = ", ".join(f'"{glob}": {base!r}' for glob in odd)
        raise RecipeError(
            f"there, {' and '.join(odd)} belong to BASE, whose weight is {base!r}",
            hint=f"if that is meant, say so first: keys({{{shown}}}, optional=True) | ...",
        )
    numbers = {name: today(name) for name in told.blocks if name != "VAE"} | ({"VAE": vae} if told.has_vae else {})
    if default is None:
        return numbers, None
    return {name: number for name, number in numbers.items() if name in blocks or number != default}, default


def _patterns(config: BlockConfig) -> tuple[str, ...]:
    return (*config.embeddings, _AVERAGES, _VAE)


def _number(weight: object) -> float:
    assert isinstance(weight, float)
    return weight


def _by_name(rule: Rule, config: BlockConfig) -> list[tuple[str, object]]:
    """The weights of a rule by the blocks' names there."""
    depth = config.depth
    if rule.kind == PRESET and len(rule.listed) in (2 * depth + 1, 2 * depth + 2):
        names = ("BASE", *config.unet)[-len(rule.listed) :]
        return list(zip(names, rule.listed, strict=True))
    if rule.kind == BLOCKS:
        return [(_name(name, config), weight) for name, weight in plain_weights(rule)]
    raise RecipeError(f"its weights are by U-Net block, {config.unet[0]} to {config.unet[-1]}, not {rule.kind}(...)")


def _name(name: str, config: BlockConfig) -> str:
    """A block's name in capitals with two digits; that of ``in3`` is ``IN03``."""
    letters = name.rstrip("0123456789")
    digits = name[len(letters) :]
    wanted = "M00" if name.lower() in ("mid", "m00") else letters.upper() + (f"{int(digits):02d}" if digits else "")
    if wanted not in ("BASE", *config.unet):
        raise RecipeError(f"it has no block {name!r}: it has BASE, {config.unet[0]} to {config.unet[-1]}")
    return wanted
