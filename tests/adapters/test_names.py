"""Names of modules in adapters: every way of naming a module of every arch means the same rows of its checkpoint."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator

import pytest

from remelt.adapters.names import is_adapter, modules_of
from remelt.adapters.pairing import Layouts, Named
from remelt.archs.arch import Arch, ComponentDialect, all_archs, find_arch
from remelt.archs.dialects import ORIGINAL
from remelt.archs.shapes import shapes_of
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import AdapterError

Rows = frozenset[tuple[str, int, int]]
"""Keys of the original layout, with the rows of each."""

DENOISERS = ("unet", "transformer")
KOHYA = {
    "unet": ("lora_unet_",),
    "transformer": ("lora_unet_", "lora_transformer_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
COMFY = ("diffusion_model.", "model.diffusion_model.", "transformer.", "unet.")
ARCHS = [
    name
    for name, arch in all_archs().items()
    if any(one.folder for part in arch.components for one in part.dialects) and shapes_of(name) is not None
]


def infos(*keys: str) -> dict[str, TensorInfo]:
    return dict.fromkeys(keys, TensorInfo(DType.F16, (4, 4)))


@functools.cache
class Model:
    """A model's layouts, and what each tensor of them is in the original one."""

    def __init__(self, arch: str) -> None:
        self.arch, shapes = find_arch(arch), shapes_of(arch)
        assert shapes is not None
        self.shapes, self.layouts = shapes, Layouts.of(self.arch, shapes)
        self._rows: dict[tuple[str, str], set[tuple[str, int, int]]] = {}
        for dialect, originals in self.layouts.originals.items():
            for original, one in originals.items():
                begin = 0
                for piece in one.pieces:
                    end = begin + piece.stop - piece.start
                    self._rows.setdefault((dialect, piece.key), set()).add((original, begin, end))
                    begin = end

    def rows(self, named: Named | None) -> Rows:
        """What the weight of a module is in the original layout."""
        key = None if named is None else self.layouts.key_of(named, "weight")
        return frozenset() if named is None or key is None else frozenset(self._rows[named.dialect, key])

    def meant(self, names: Iterable[str]) -> dict[str, Rows]:
        """What modules of those names are."""
        found = modules_of(infos(*(f"{name}.lora_up.weight" for name in names)))
        return {name: self.rows(self.layouts.find(one)) for name, one in found.items()}


def folders(arch: Arch) -> Iterator[tuple[str, tuple[str, ...], ComponentDialect]]:
    """The folders of diffusers that adapters are made for, with the prefixes of their original keys."""
    for component in arch.components:
        for part in component.dialects:
            if part.folder in KOHYA:
                yield part.folder, component.prefixes, part


def names_of(folder: str, path: str) -> Iterator[str]:
    """The ways in which trainers name a module."""
    yield from (prefix + path.replace(".", "_") for prefix in KOHYA[folder])
    yield f"{folder}.{path}"
    if folder in DENOISERS:
        yield from (prefix + path for prefix in (*COMFY, "base_model.model."))
        yield "lycoris_" + path.replace(".", "_")


@pytest.mark.parametrize("name", ARCHS)
def test_every_name_of_a_module_means_the_same_rows(name: str) -> None:
    model, count = Model(name), 0
    for folder, prefixes, part in folders(model.arch):
        for key, info in model.shapes.items():
            prefix = next((one for one in prefixes if key.startswith(one)), None)
            if prefix is not None and key.endswith(".weight"):
                due: Rows = frozenset({(key, 0, info.shape[0])})
                path = key.removeprefix(prefix).removesuffix(".weight")
                own = [key.removesuffix(".weight"), *(names_of(folder, path) if folder in DENOISERS else ())]
                assert model.meant(own) == dict.fromkeys(own, due)
                count += 1
        for key in model.layouts.tensors[part.dialect]:
            if key.startswith(f"{folder}/") and key.endswith(".weight"):
                path = key.removeprefix(f"{folder}/").removesuffix(".weight")
                due = model.rows(Named(part.dialect, key.removesuffix(".weight"), folder))
                assert due
                own = list(names_of(folder, path))
                assert model.meant(own) == dict.fromkeys(own, due)
    assert (count > 100) == any(folder in DENOISERS for folder, _, _ in folders(model.arch))


PARTS = "model.diffusion_model."


@pytest.mark.parametrize(
    ("arch", "name", "key", "share"),
    [
        ("sd1", "lora_te_text_model_encoder_layers_3_mlp_fc1",
         "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight", (0, 1)),
        ("sd1", "text_encoder.encoder.layers.3.mlp.fc1",
         "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight", (0, 1)),
        ("sd2", "lora_te_text_model_encoder_layers_3_self_attn_k_proj",
         "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight", (1, 3)),
        ("sdxl", "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k",
         f"{PARTS}input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight", (0, 1)),
        ("sdxl", "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_k",
         f"{PARTS}input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight", (0, 1)),
        ("sdxl", "text_encoders.clip_g.transformer.text_model.encoder.layers.7.self_attn.v_proj",
         "conditioner.embedders.1.model.transformer.resblocks.7.attn.in_proj_weight", (2, 3)),
        ("sdxl", "text_encoders.clip_l.transformer.text_model.encoder.layers.7.self_attn.v_proj",
         "conditioner.embedders.0.transformer.text_model.encoder.layers.7.self_attn.v_proj.weight", (0, 1)),
        ("flux", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
         "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight", (0, 1)),
        ("flux", "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
         "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight", (0, 1)),
        ("flux", "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
         "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight", (0, 1)),
        ("flux", "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
         "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight", (0, 1)),
        ("flux", "transformer.transformer_blocks.2.attn.to_q", f"{PARTS}double_blocks.2.img_attn.qkv.weight", (0, 3)),
        ("flux", "lora_transformer_transformer_blocks_2_attn_add_v_proj",
         f"{PARTS}double_blocks.2.txt_attn.qkv.weight", (2, 3)),
        ("flux", "lora_unet_double_blocks_2_img_attn_qkv", f"{PARTS}double_blocks.2.img_attn.qkv.weight", (0, 1)),
        ("sd3", "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
         "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight", (0, 1)),
        ("wan", "lora_unet_blocks_0_self_attn_q", f"{PARTS}blocks.0.self_attn.q.weight", (0, 1)),
        ("wan", "diffusion_model.blocks.0.cross_attn.o", f"{PARTS}blocks.0.cross_attn.o.weight", (0, 1)),
        ("wan", "transformer.blocks.0.attn2.to_out.0", f"{PARTS}blocks.0.cross_attn.o.weight", (0, 1)),
        ("qwen_image", "transformer_blocks.0.attn.to_q", f"{PARTS}transformer_blocks.0.attn.to_q.weight", (0, 1)),
        ("qwen_image", "lora_unet_transformer_blocks_0_img_mlp_net_0_proj",
         f"{PARTS}transformer_blocks.0.img_mlp.net.0.proj.weight", (0, 1)),
        ("hunyuan_video", "diffusion_model.double_blocks.1.img_mlp.2",
         f"{PARTS}double_blocks.1.img_mlp.fc2.weight", (0, 1)),
        ("hunyuan_video", "diffusion_model.single_blocks.1.modulation.lin",
         f"{PARTS}single_blocks.1.modulation.linear.weight", (0, 1)),
        ("hunyuan_video", "diffusion_model.double_blocks.1.txt_attn.qkv",
         f"{PARTS}double_blocks.1.txt_attn_qkv.weight", (0, 1)),
    ],
)  # fmt: skip
def test_names_as_trainers_write_them(arch: str, name: str, key: str, share: tuple[int, int]) -> None:
    """``share`` is which of how many equal parts of the tensor's rows are meant."""
    model = Model(arch)
    size = model.shapes[key].shape[0] // share[1]
    assert model.meant([name]) == {name: {(key, share[0] * size, (share[0] + 1) * size)}}


@pytest.mark.parametrize(
    ("key", "name", "part"),
    [
        ("lora_unet_mid_block.lora_up.weight", "lora_unet_mid_block", "lora_up.weight"),
        ("lora_unet_mid_block.alpha", "lora_unet_mid_block", "alpha"),
        ("unet.mid.to_q.lora_A.weight", "unet.mid.to_q", "lora_down.weight"),
        ("unet.mid.to_q.lora_B.default_0.weight", "unet.mid.to_q", "lora_up.weight"),
        ("unet.mid.to_q.lora_magnitude_vector", "unet.mid.to_q", "dora_scale"),
        ("unet.mid.to_q.lora_magnitude_vector.default.weight", "unet.mid.to_q", "dora_scale"),
        ("mid.attn1.processor.to_out_lora.up.weight", "mid.attn1.to_out.0", "lora_up.weight"),
        ("mid.attn1.processor.to_q_lora.down.weight", "mid.attn1.to_q", "lora_down.weight"),
        ("text_encoder.layers.0.self_attn.to_out_lora.up.weight",
         "text_encoder.layers.0.self_attn.out_proj", "lora_up.weight"),
        ("text_encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight",
         "text_encoder.layers.0.mlp.fc1", "lora_down.weight"),
        ("double_blocks.3.processor.qkv_lora2.up.weight", "double_blocks.3.txt_attn.qkv", "lora_up.weight"),
        ("double_blocks.3.processor.proj_lora1.down.weight", "double_blocks.3.img_attn.proj", "lora_down.weight"),
        ("single_blocks.3.processor.proj_lora.down.weight", "single_blocks.3.linear2", "lora_down.weight"),
        ("single_blocks.3.processor.qkv_lora.up.weight", "single_blocks.3.linear1", "lora_up.weight"),
        ("diffusion_model.blocks.3.diff_m", "diffusion_model.blocks.3.modulation", "diff"),
        ("diffusion_model.blocks.3.norm3.diff_b", "diffusion_model.blocks.3.norm3", "diff_b"),
        ("base_model.model.lm_head.weight", "base_model.model.lm_head", "set_weight"),
        ("base_model.model.lm_head.modules_to_save.weight", "base_model.model.lm_head", "set_weight"),
        ("base_model.model.lm_head.modules_to_save.default.bias", "base_model.model.lm_head", "set_bias"),
        ("base_model.model.x.base_layer.bias", "base_model.model.x", "set_bias"),
        ("base_model.model.x.ln_tuning_layers.weight", "base_model.model.x", "set_weight"),
        ("base_model.model.x.lora_embedding_A", "base_model.model.x", "lora_down.weight"),
    ],
)  # fmt: skip
def test_parts_are_told_from_modules(key: str, name: str, part: str) -> None:
    assert {one.name: list(one.parts.items()) for one in modules_of(infos(key)).values()} == {name: [(part, key)]}
    assert is_adapter([key])


def test_facts_that_names_tell_are_kept_as_options() -> None:
    keys = ("x.lora_embedding_A", "y.lora_magnitude_vector", "single_blocks.3.processor.qkv_lora.up.weight")
    found = modules_of(infos(*keys, "z.lora_A.weight"))
    told = [{"transposed": True}, {"magnitude_on_output": True}, {"of_first_rows": True}, {}]
    assert [one.options for one in found.values()] == told


def test_the_weight_beside_a_mark_of_inputs_is_that_of_ia3() -> None:
    found = modules_of(infos("lycoris_mid.weight", "lycoris_mid.on_input"))
    assert list(found["lycoris_mid"].parts) == ["weight", "on_input"]


def test_a_copy_of_the_model_s_own_weight_is_no_part() -> None:
    found = modules_of(infos("base_model.model.lm_head.base_layer.weight", "base_model.model.lm_head.lora_A.weight"))
    assert list(found["base_model.model.lm_head"].parts) == ["lora_down.weight"]


def test_models_are_no_adapters() -> None:
    assert not is_adapter([])
    for name in ARCHS:
        assert not is_adapter(shapes_of(name) or ())
    assert not is_adapter(["model.norm.weight", "model.head.weight", "x.alpha"])
    assert is_adapter(["base_model.model.x.vera_lambda_b", "base_model.model.x.vera_lambda_d"])


def test_two_tensors_for_one_part_are_refused() -> None:
    told = "x.lora_down.weight and x.lora_A.weight are two tensors for one part of x"
    with pytest.raises(AdapterError, match=re.escape(told)) as caught:
        modules_of(infos("x.lora_down.weight", "x.lora_A.weight"))
    assert caught.value.hint == "the file holds several adapters: save one of them"


def test_tensors_of_no_kind_are_refused_or_left_out() -> None:
    strange = [f"bundle_emb.{name}" for name in "abcde"]
    told = (
        "5 of its tensors are no part of any kind of adapter that is known: bundle_emb.a, bundle_emb.b, bundle_emb.c "
        "and 2 more"
    )
    with pytest.raises(AdapterError, match=re.escape(told)) as caught:
        modules_of(infos("x.lora_up.weight", *strange))
    assert caught.value.hint is not None and "LoRA, LoCon, DoRA" in caught.value.hint
    assert list(modules_of(infos("x.lora_up.weight", *strange), ignore_unknown=True)) == ["x"]
    with pytest.raises(AdapterError, match="5 of its tensors are no part"):
        modules_of(infos(*strange), ignore_unknown=True)


def test_a_table_of_modulation_is_changed_as_it_is() -> None:
    layouts = Model("wan").layouts
    found = layouts.find(*modules_of(infos("diffusion_model.blocks.3.diff_m")).values())
    assert found is not None
    assert layouts.key_of(found, "weight") == f"{PARTS}blocks.3.modulation"
    assert found.dialect == ORIGINAL
