"""Key names and shapes of language models, of vision-language models and of encoders that are files of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from remelt.archs.model_parts import Narrow, Shapes, clip, clip_layers, conv, linear, norm, openclip, t5, vae


@dataclass(frozen=True)
class Decoder:
    """The sizes of a language model: ``head`` is the width of one attention head, ``inner`` that of the MLP."""

    layers: int
    hidden: int
    heads: int
    key_heads: int
    head: int
    inner: int
    vocabulary: int

    def narrowed(self, narrow: Narrow) -> Decoder:
        """The same with smaller widths; as many layers and heads."""
        return replace(
            self,
            hidden=narrow(self.hidden),
            head=narrow(self.head),
            inner=narrow(self.inner),
            vocabulary=narrow(self.vocabulary),
        )


@dataclass(frozen=True)
class Experts:
    """What a DeepSeek has beside the sizes of a decoder, whose ``head`` is that of values.

    Queries have ``query_rank``, or none; ``plain`` and ``rotary`` are the halves of a head of queries and keys. From
    layer ``dense`` on there are ``count`` experts and ``shared`` common ones. V3 has ``corrected`` gates.
    """

    query_rank: int | None
    key_rank: int
    plain: int
    rotary: int
    dense: int
    count: int
    shared: int
    inner: int
    corrected: bool


def decoder(
    root: str,
    size: Decoder,
    *,
    bias: bool = False,
    head_norms: bool = False,
    fused: str = "",
    norms: tuple[str, ...] = (),
) -> Shapes:
    """A decoder below ``root``, without its output head.

    ``bias`` is that of queries, keys and values; ``head_norms`` are those of queries and keys; ``fused`` has "a" where
    attention is one projection, and "m" where the MLP's gate is; ``norms`` are further ones of a layer.
    """
    queries, keys = size.heads * size.head, size.key_heads * size.head
    yield f"{root}embed_tokens.weight", (size.vocabulary, size.hidden)
    for layer in range(size.layers):
        name = f"{root}layers.{layer}"
        if "a" in fused:
            yield from linear(f"{name}.self_attn.qkv_proj", queries + 2 * keys, size.hidden, bias=bias)
        else:
            for letter, rows in (("q", queries), ("k", keys), ("v", keys)):
                yield from linear(f"{name}.self_attn.{letter}_proj", rows, size.hidden, bias=bias)
        yield f"{name}.self_attn.o_proj.weight", (size.hidden, queries)
        if head_norms:
            yield from ((f"{name}.self_attn.{letter}_norm.weight", (size.head,)) for letter in "qk")
        yield from gated(f"{name}.mlp", size.hidden, size.inner, fused="m" in fused)
        for one in ("input_layernorm", "post_attention_layernorm", *norms):
            yield f"{name}.{one}.weight", (size.hidden,)
    yield f"{root}norm.weight", (size.hidden,)


def gated(name: str, hidden: int, inner: int, *, fused: bool = False) -> Shapes:
    """An MLP with a gate."""
    if fused:
        yield f"{name}.gate_up_proj.weight", (2 * inner, hidden)
    else:
        yield f"{name}.gate_proj.weight", (inner, hidden)
        yield f"{name}.up_proj.weight", (inner, hidden)
    yield f"{name}.down_proj.weight", (hidden, inner)


def head(name: str, size: Decoder) -> Shapes:
    """The output head."""
    yield f"{name}.weight", (size.vocabulary, size.hidden)


GEMMA_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
GLM_NORMS = ("post_self_attn_layernorm", "post_mlp_layernorm")


def deepseek(size: Decoder, experts: Experts) -> Shapes:
    """DeepSeek V2 or V3: keys and values from one narrow state, many experts."""
    hidden, key_width = size.hidden, experts.plain + experts.rotary
    yield "model.embed_tokens.weight", (size.vocabulary, hidden)
    for layer in range(size.layers):
        name = f"model.layers.{layer}"
        if experts.query_rank is None:
            yield f"{name}.self_attn.q_proj.weight", (size.heads * key_width, hidden)
        else:
            yield f"{name}.self_attn.q_a_proj.weight", (experts.query_rank, hidden)
            yield f"{name}.self_attn.q_a_layernorm.weight", (experts.query_rank,)
            yield f"{name}.self_attn.q_b_proj.weight", (size.heads * key_width, experts.query_rank)
        yield f"{name}.self_attn.kv_a_proj_with_mqa.weight", (experts.key_rank + experts.rotary, hidden)
        yield f"{name}.self_attn.kv_a_layernorm.weight", (experts.key_rank,)
        yield f"{name}.self_attn.kv_b_proj.weight", (size.heads * (experts.plain + size.head), experts.key_rank)
        yield f"{name}.self_attn.o_proj.weight", (hidden, size.heads * size.head)
        for one in ("input_layernorm", "post_attention_layernorm"):
            yield f"{name}.{one}.weight", (hidden,)
        if layer < experts.dense:
            yield from gated(f"{name}.mlp", hidden, size.inner)
            continue
        yield f"{name}.mlp.gate.weight", (experts.count, hidden)
        if experts.corrected:
            yield f"{name}.mlp.gate.e_score_correction_bias", (experts.count,)
        for expert in range(experts.count):
            yield from gated(f"{name}.mlp.experts.{expert}", hidden, experts.inner)
        yield from gated(f"{name}.mlp.shared_experts", hidden, experts.shared * experts.inner)
    yield "model.norm.weight", (hidden,)
    yield from head("lm_head", size)


def gpt_oss(size: Decoder, experts: int) -> Shapes:
    """GPT-OSS in BF16: attention with sinks, all experts of a layer in one tensor."""
    queries, keys = size.heads * size.head, size.key_heads * size.head
    yield "model.embed_tokens.weight", (size.vocabulary, size.hidden)
    for layer in range(size.layers):
        name = f"model.layers.{layer}"
        yield f"{name}.self_attn.sinks", (size.heads,)
        for letter, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield from linear(f"{name}.self_attn.{letter}_proj", rows, size.hidden)
        yield from linear(f"{name}.self_attn.o_proj", size.hidden, queries)
        yield from linear(f"{name}.mlp.router", experts, size.hidden)
        yield f"{name}.mlp.experts.gate_up_proj", (experts, size.hidden, 2 * size.inner)
        yield f"{name}.mlp.experts.gate_up_proj_bias", (experts, 2 * size.inner)
        yield f"{name}.mlp.experts.down_proj", (experts, size.inner, size.hidden)
        yield f"{name}.mlp.experts.down_proj_bias", (experts, size.hidden)
        for one in ("input_layernorm", "post_attention_layernorm"):
            yield f"{name}.{one}.weight", (size.hidden,)
    yield "model.norm.weight", (size.hidden,)
    yield from head("lm_head", size)


def vision_tower(
    root: str, layers: int, width: int, inner: int, positions: int, patch: int, *, class_token: bool
) -> Shapes:
    """The image encoder of CLIP (with a ``class_token``) or of SigLIP, as transformers names it."""
    if class_token:
        yield f"{root}embeddings.class_embedding", (width,)
        yield from norm(f"{root}pre_layrnorm", width)
        yield f"{root}embeddings.patch_embedding.weight", (width, 3, patch, patch)
    else:
        yield from conv(f"{root}embeddings.patch_embedding", width, 3, patch)
    yield f"{root}embeddings.position_embedding.weight", (positions, width)
    yield from clip_layers(root, layers, width, inner)
    yield from norm(f"{root}post_layernorm", width)


def llava(size: Decoder, width: int, inner: int, layers: int, positions: int, patch: int) -> Shapes:
    """LLaVA 1.5 as transformers writes it: CLIP's image encoder, a projector of two layers, a Llama."""
    yield from vision_tower("vision_tower.vision_model.", layers, width, inner, positions, patch, class_token=True)
    yield from linear("multi_modal_projector.linear_1", size.hidden, width)
    yield from linear("multi_modal_projector.linear_2", size.hidden, size.hidden)
    yield from decoder("language_model.model.", size)
    yield from head("language_model.lm_head", size)


def gemma3(size: Decoder, width: int, inner: int, layers: int, positions: int, patch: int) -> Shapes:
    """Gemma 3 with eyes: SigLIP's image encoder, a projection, a decoder whose output head is its embedding."""
    yield from vision_tower("vision_tower.vision_model.", layers, width, inner, positions, patch, class_token=False)
    yield "multi_modal_projector.mm_input_projection_weight", (width, size.hidden)
    yield "multi_modal_projector.mm_soft_emb_norm.weight", (width,)
    yield from decoder("language_model.model.", size, head_norms=True, norms=GEMMA_NORMS)


def vit(root: str, layers: int, width: int, positions: int, patch: int) -> Shapes:
    """A vision transformer, as files of transformers name it."""
    yield f"{root}embeddings.cls_token", (1, 1, width)
    yield f"{root}embeddings.position_embeddings", (1, positions, width)
    yield from conv(f"{root}embeddings.patch_embeddings.projection", width, 3, patch)
    for layer in range(layers):
        name = f"{root}encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            yield from linear(f"{name}.attention.attention.{part}", width, width)
        yield from linear(f"{name}.attention.output.dense", width, width)
        yield from linear(f"{name}.intermediate.dense", 4 * width, width)
        yield from linear(f"{name}.output.dense", width, 4 * width)
        for one in ("layernorm_before", "layernorm_after"):
            yield from norm(f"{name}.{one}", width)
    yield from norm(f"{root}layernorm", width)


LLAMA_3_8B = Decoder(32, 4096, 32, 8, 128, 14336, 128256)
LLAMA_2_7B = Decoder(32, 4096, 32, 32, 128, 11008, 32064)
QWEN_25_7B = Decoder(28, 3584, 28, 4, 128, 18944, 152064)
QWEN_3_8B = Decoder(36, 4096, 32, 8, 128, 12288, 151936)
GEMMA_2_9B = Decoder(42, 3584, 16, 8, 256, 14336, 256000)
GEMMA_3_4B = Decoder(34, 2560, 8, 4, 256, 10240, 262208)
PHI_3_MINI = Decoder(32, 3072, 32, 32, 96, 8192, 32064)
GLM_4_9B = Decoder(40, 4096, 32, 2, 128, 13696, 151552)
GPT_OSS_20B = Decoder(24, 2880, 64, 8, 64, 2880, 201088)
DEEPSEEK_V2_LITE = Decoder(27, 2048, 16, 16, 128, 10944, 102400)
DEEPSEEK_V3 = Decoder(61, 7168, 128, 128, 128, 18432, 129280)
V2_LITE_EXPERTS = Experts(None, 512, 128, 64, dense=1, count=64, shared=2, inner=1408, corrected=False)
V3_EXPERTS = Experts(1536, 512, 128, 64, dense=3, count=256, shared=1, inner=2048, corrected=True)


def _deepseek(narrow: Narrow) -> Shapes:
    few = replace(V2_LITE_EXPERTS, key_rank=narrow(512), plain=narrow(128), rotary=narrow(64), inner=narrow(1408))
    return deepseek(DEEPSEEK_V2_LITE.narrowed(narrow), few)


def _with_head(
    size: Decoder, *, bias: bool = False, head_norms: bool = False, fused: str = "", norms: tuple[str, ...] = ()
) -> Callable[[Narrow], Shapes]:
    def made(narrow: Narrow) -> Shapes:
        small = size.narrowed(narrow)
        yield from decoder("model.", small, bias=bias, head_norms=head_norms, fused=fused, norms=norms)
        yield from head("lm_head", small)

    return made


LANGUAGE_MODELS: Mapping[str, Callable[[Narrow], Shapes]] = MappingProxyType(
    {
        "llama": _with_head(LLAMA_3_8B),
        "qwen2": _with_head(QWEN_25_7B, bias=True),
        "qwen3": _with_head(QWEN_3_8B, head_norms=True),
        "gemma2": lambda narrow: decoder("model.", GEMMA_2_9B.narrowed(narrow), norms=GEMMA_NORMS),
        "gemma3": lambda narrow: gemma3(GEMMA_3_4B.narrowed(narrow), narrow(1152), narrow(4304), 27, 4096, 14),
        "phi3": _with_head(PHI_3_MINI, fused="am"),
        "glm": _with_head(GLM_4_9B, bias=True, fused="m", norms=GLM_NORMS),
        "gpt_oss": lambda narrow: gpt_oss(GPT_OSS_20B.narrowed(narrow), 32),
        "deepseek": _deepseek,
        "llava": lambda narrow: llava(LLAMA_2_7B.narrowed(narrow), narrow(1024), narrow(4096), 24, 577, 14),
    }
)
"""Of each arch a published model, narrowed."""

PARTS: Mapping[str, Callable[[Narrow], Shapes]] = MappingProxyType(
    {
        "clip_l": lambda narrow: clip("text_model.", 12, narrow(768), narrow(49408)),
        "open_clip_g": lambda narrow: openclip("", 32, narrow(1280), narrow(49408)),
        "open_clip_h": lambda narrow: openclip("", 24, narrow(1024), narrow(49408)),
        "t5": lambda narrow: t5("", narrow),
        "vae": lambda narrow: vae("", narrow(128), 4),
        "vit": lambda narrow: vit("vit.", 12, narrow(768), 197, 16),
    }
)
"""Of each part that is a file of its own a published model, narrowed."""
