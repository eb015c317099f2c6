"""Names in adapter files: of which module of a model a tensor is, and which part of the change to it.

Trainers name a module by its path, with dots or with underscores in their place, after a prefix that says in which
component it is; and a part by a suffix. Parts are told by the names that kohya and LyCORIS have for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from remelt.core.tensor_info import TensorInfo
from remelt.errors import AdapterError

_UP, _DOWN, _DORA = "lora_up.weight", "lora_down.weight", "dora_scale"

_AS_THEY_ARE = (
    *(_UP, _DOWN, "lora_mid.weight", "lora_up.bias", "alpha", _DORA, "diff", "diff_b", "set_weight"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("w_norm", "b_norm", "on_input", "oft_blocks", "rescale"),
    *("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
)
_OTHERWISE = {
    r"lora_A(?:\.[^.]+)?\.weight": _DOWN,
    r"lora_B(?:\.[^.]+)?\.weight": _UP,
    r"lora_B(?:\.[^.]+)?\.bias": "lora_up.bias",
    r"lora_mid\.default\.weight": "lora_mid.weight",
    r"lora_magnitude_vector(?:\.[^.]+)??(?:\.weight)?": _DORA,
    r"lora(?:_linear_layer)?\.down\.weight": _DOWN,
    r"lora(?:_linear_layer)?\.up\.weight": _UP,
    r"ia3_l(?:\.[^.]+)?": "ia3_l",
    r"oft_[rR](?:\.[^.]+)?(?:\.weight)?": "oft_R",
    r"boft_R(?:\.[^.]+)?": "boft_R",
    r"boft_s(?:\.[^.]+)?": "boft_s",
    r"oft_embedding_R(?:\.[^.]+)?(?:\.weight)?": "oft_R",
    r"lora_embedding_A(?:\.[^.]+)?": _DOWN,
    r"lora_embedding_B(?:\.[^.]+)?": _UP,
}
_OPTIONS = {"_embedding_": "transposed", "lora_magnitude_vector": "magnitude_on_output"}
"""What else the names of some parts say: vectors by column, as of PEFT's embeddings; magnitudes of outputs.

``of_first_rows`` is said of queries, keys and values of XLabs' that are the first rows of the model's matrix.
"""
_PLAIN = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, sorted(_AS_THEY_ARE, key=len, reverse=True)))})(?:\.default)?")
_PATTERNS = [(re.compile(rf"(.+?)\.{pattern}"), part) for pattern, part in _OTHERWISE.items()]
_PROCESSOR = re.compile(r"(?P<module>.+)\.processor\.(?P<layer>to_[qkv]|to_out)_lora\.(?P<way>up|down)\.weight")
_OLD_TEXT = re.compile(r"(?P<module>.+\.self_attn)\.to_(?P<layer>[qkv]|out)_lora\.(?P<way>up|down)\.weight")
_MODULATION = re.compile(r"(.+)\.diff_m")
"""A difference of a block's table of modulation, as distilled models of Wan have it."""
_XLABS = re.compile(
    r"(?P<block>.+_blocks\.\d+)\.processor\.(?P<layer>qkv|proj)_lora(?P<stream>[12]?)\.(?P<way>up|down)\.weight"
)
_OF_PEFT = "base_model.model."
_COPIED = re.compile(r".+\.base_layer\.weight")
"""What PEFT keeps beside the parts of an embedding: the model's own tensor, which it does not train."""
_SAVED = re.compile(
    rf"({re.escape(_OF_PEFT)}.+?)(?:\.base_layer|\.(?:modules_to_save|ln_tuning_layers)(?:\.default)?)?\.(weight|bias)"
)
"""What PEFT trains whole: modules, norms, and with ``bias`` the biases of layers."""

PLACES: dict[str, tuple[str, ...]] = {
    "lora_unet_": ("unet", "transformer"),
    "lora_transformer_": ("transformer", "unet"),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3", "text_encoder_2"),
    "text_encoders.clip_l.transformer.": ("text_encoder",),
    "text_encoders.clip_g.transformer.": ("text_encoder_2",),
    "text_encoders.t5xxl.transformer.": ("text_encoder_3", "text_encoder_2", "text_encoder"),
    "text_encoder_3.": ("text_encoder_3",),
    "text_encoder_2.": ("text_encoder_2",),
    "text_encoder.": ("text_encoder",),
    "model.diffusion_model.": ("unet", "transformer"),
    "diffusion_model.": ("unet", "transformer"),
    "transformer.": ("transformer", "unet"),
    "unet.": ("unet", "transformer"),
    "vae.": ("vae",),
    "lycoris_": (),
    _OF_PEFT: (),
}
"""Where modules are whose names begin so: folders of diffusers, the likeliest first; none where any may be meant."""


@dataclass
class AdapterModule:
    """The tensors that change one module of a model: the file's keys by part, and what is said of the module.

    ``paths`` are its names with underscores for dots, without more and more of the prefix, each with the folders of
    diffusers in which it may be. ``options`` are other facts that the names of parts tell.
    """

    name: str
    paths: tuple[tuple[str, tuple[str, ...]], ...]
    parts: dict[str, str] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)


def is_adapter(keys: Iterable[str]) -> bool:
    """Whether a file with those keys is an adapter: at least half of them are parts of one, or named by PEFT.

    >>> is_adapter(["lora_unet_mid_block.lora_up.weight", "lora_unet_mid_block.lora_down.weight"])
    True
    >>> is_adapter(["model.norm.weight"])
    False
    """
    names = list(keys)
    return bool(names) and 2 * sum(key.startswith(_OF_PEFT) or _told(key) is not None for key in names) >= len(names)


def modules_of(tensors: Mapping[str, TensorInfo], *, ignore_unknown: bool = False) -> dict[str, AdapterModule]:
    """The modules of an adapter, by name; `AdapterError` where keys are no part of any, or one part is there twice.

    With ``ignore_unknown``, keys that are no part of any are left out.

    >>> from remelt.core.dtype import DType
    >>> info = TensorInfo(DType.F16, (4, 8))
    >>> found = modules_of({"unet.mid.to_q.lora_A.weight": info, "unet.mid.to_q.lora_B.weight": info})
    >>> found["unet.mid.to_q"].paths[-1], list(found["unet.mid.to_q"].parts)
    (('mid_to_q', ('unet', 'transformer')), ['lora_down.weight', 'lora_up.weight'])
    """
    found: dict[str, AdapterModule] = {}
    strange = []
    scaled = {key.removesuffix(".on_input") for key in tensors if key.endswith(".on_input")}
    for key in tensors:
        if _COPIED.fullmatch(key):
            continue
        told = _told(key)
        if told is None and key.removesuffix(".weight") in scaled:
            told = key.removesuffix(".weight"), "weight", ""
        if told is None:
            strange.append(key)
            continue
        name, part, option = told
        module = found.get(name)
        if module is None:
            module = found[name] = AdapterModule(name, tuple(_paths(name)))
        if part in module.parts:
            raise AdapterError(
                f"{module.parts[part]} and {key} are two tensors for one part of {name}",
                hint="the file holds several adapters: save one of them",
            )
        module.parts[part] = key
        module.options |= {option: True} if option else {}
    if strange and not (found and ignore_unknown):
        shown = ", ".join(strange[:3]) + (f" and {len(strange) - 3} more" if len(strange) > 3 else "")
        raise AdapterError(
            f"{len(strange)} of its tensors are no part of any kind of adapter that is known: {shown}",
            hint="known are LoRA, LoCon, DoRA, LoHa, LoKr, IA3, OFT, BOFT, GLoRA and full differences",
        )
    return found


def _told(key: str) -> tuple[str, str, str] | None:
    """The module and the part that a key names, and what else its name says."""
    if found := _PROCESSOR.fullmatch(key):
        layer = "to_out.0" if found["layer"] == "to_out" else found["layer"]
        return f"{found['module']}.{layer}", _UP if found["way"] == "up" else _DOWN, ""
    if found := _OLD_TEXT.fullmatch(key):
        return f"{found['module']}.{found['layer']}_proj", _UP if found["way"] == "up" else _DOWN, ""
    if found := _MODULATION.fullmatch(key):
        return f"{found[1]}.modulation", "diff", ""
    if found := _XLABS.fullmatch(key):
        module, option = _of_xlabs(found)
        return module, _UP if found["way"] == "up" else _DOWN, option
    if found := _PLAIN.fullmatch(key):
        return found[1], found[2], ""
    for pattern, part in _PATTERNS:
        if found := pattern.fullmatch(key):
            return found[1], part, next((said for word, said in _OPTIONS.items() if word in pattern.pattern), "")
    found = _SAVED.fullmatch(key)
    return None if found is None else (found[1], f"set_{found[2]}", "")


def _of_xlabs(found: re.Match[str]) -> tuple[str, str]:
    """What XLabs' trainer of Flux means: numbered by the stream that an attention is of.

    Blocks of one stream have queries, keys and values in the first rows of a matrix.
    """
    block, layer = found["block"], found["layer"]
    if found["stream"]:
        return f"{block}.{'img' if found['stream'] == '1' else 'txt'}_attn.{layer}", ""
    if "single_blocks." not in block:
        return f"{block}.{layer}", ""
    return (f"{block}.linear2", "") if layer == "proj" else (f"{block}.linear1", "of_first_rows")


def _paths(name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A module's path with underscores for dots, as it is and without what says in which component it is."""
    places: tuple[str, ...] = ()
    while True:
        yield name.replace(".", "_"), places
        prefix = next((one for one in PLACES if name.startswith(one) and len(name) > len(one)), None)
        if prefix is None:
            return
        name, places = name[len(prefix) :], PLACES[prefix] or places
