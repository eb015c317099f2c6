"""Pipelines of diffusers as the oracle: a LoRA fused by them, and one merged by remelt, in every way of naming.

Of each pipeline one LoRA is drawn, of every linear layer and convolution that trainers train, with ranks and alphas
that differ. diffusers fuses it from its own file; files with other names hold the same LoRA.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import remelt as rm
from remelt.archs.arch import find_arch
from remelt.archs.dialects import Spelling, to_original
from remelt.core.dtype import DType
from remelt.core.pieces import Piece
from remelt.core.tensor_info import TensorInfo
from remelt.recipe.adapter import adapter

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

there = runpy.run_path(str(Path(__file__).parents[1] / "api" / "test_dialects.py"))
KINDS: dict[str, Any] = there["KINDS"]
image: Callable[[Any, Any], Tensor] = there["image"]
parts_of: Callable[[Any], dict[str, nn.Module]] = there["modules_of"]

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{name}Warning") for name in ("User", "Future", "Deprecation", "Runtime")
]

SCALE = 0.8
BASES = [pytest.param("base", marks=pytest.mark.slow), "base.safetensors"]
"""The model as a folder, and as a single file in the original layout."""
TRAINED = {
    "sd1": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer", "text_encoder", "text_encoder_2"),
    "flux": ("transformer", "text_encoder"),
}
KOHYA = {
    "sd1": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    "sd3": {"transformer": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    "flux": {"transformer": "lora_transformer_", "text_encoder": "lora_te1_"},
}
"""What kohya's trainer puts before the names of modules; before diffusers' of Flux, other trainers do."""


class Factors(NamedTuple):
    """A module's LoRA."""

    up: Tensor
    down: Tensor
    alpha: float


class Case(NamedTuple):
    """A pipeline without and with its LoRA, in folders, files and memory."""

    name: str
    kind: Any
    folder: Path
    lora: dict[str, dict[str, Factors]]
    """By component and module."""
    fused: Any

    def base(self) -> Any:
        """The pipeline without the LoRA."""
        return made(self.kind)


def made(kind: Any) -> Any:
    torch.manual_seed(0)
    pipe = kind.make()
    for module in parts_of(pipe).values():
        module.eval()
    return pipe


def drawn(module: nn.Module, component: str, source: torch.Generator) -> dict[str, Factors]:
    """A LoRA of a component's layers: of a text encoder those of its blocks."""
    found = {}
    for name, layer in module.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or ("text" in component and "layers." not in name):
            continue
        rank, (out, inside, *kernel) = 2 + len(found) % 3, layer.weight.shape
        up = torch.randn(out, rank, *(1 for _ in kernel), generator=source) * 0.1
        down = torch.randn(rank, inside, *kernel, generator=source) * 0.1
        found[name] = Factors(up, down, 1.0 + len(found) % 4)
    return found


@pytest.fixture(scope="module", params=list(KINDS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, kind, folder = request.param, KINDS[request.param], tmp_path_factory.mktemp(request.param)
    pipe, source = made(kind), torch.Generator().manual_seed(1)
    pipe.save_pretrained(folder / "base")
    rm.convert(folder / "base", folder / "base.safetensors", to="original")
    lora = {component: drawn(parts_of(pipe)[component], component, source) for component in TRAINED[name]}
    written: dict[str, Any] = {}
    for component, modules in lora.items():
        patterns = {
            "rank_pattern": {f"^{re.escape(module)}": len(one.down) for module, one in modules.items()},
            "alpha_pattern": {f"^{re.escape(module)}": one.alpha for module, one in modules.items()},
        }
        config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=list(modules), **patterns)
        written[f"{component}_lora_layers"] = {
            f"{module}.lora_{way}.weight": tensor
            for module, one in modules.items()
            for way, tensor in (("A", one.down), ("B", one.up))
        }
        written[f"{component}_lora_adapter_metadata"] = config.to_dict()
    pipe.save_lora_weights(str(folder), **written)
    fused = made(kind)
    fused.load_lora_weights(str(folder / "pytorch_lora_weights.safetensors"))
    return Case(name, kind, folder, lora, merged_by_diffusers(fused, lora))


def merged_by_diffusers(pipe: Any, components: Mapping[str, object]) -> Any:
    pipe.fuse_lora(components=list(components), lora_scale=SCALE)
    pipe.unload_lora_weights()
    return pipe


def states(pipe: Any) -> dict[str, Tensor]:
    return {f"{name}/{key}": one for name, part in parts_of(pipe).items() for key, one in part.state_dict().items()}


def near(found: Mapping[str, Tensor], due: Mapping[str, Tensor]) -> None:
    assert found.keys() == due.keys()
    far = {key: float((found[key] - due[key]).abs().max()) for key in due}
    assert {key: one for key, one in far.items() if one > 2e-7} == {}


def merged(case: Case, file: Path, at: Path, base: str = "base") -> Any:
    """The pipeline that remelt makes, with the LoRA of a file, of a folder or of a single file."""
    recipe = rm.model(case.folder / base) + SCALE * adapter(str(file))
    if base == "base":
        out = rm.merge(recipe, at / "out", dialect="diffusers", like=case.folder / "base")
    else:
        single = rm.merge(recipe, at / "out.safetensors")
        out = rm.convert(single, at / "out", to="diffusers", like=case.folder / "base")
    pipe = made(case.kind)
    absent = {part: None for part, found in pipe.components.items() if found is None}
    return type(pipe).from_pretrained(str(out), **absent)


def written(path: Path, lora: Mapping[str, Factors]) -> Path:
    """A file of modules by their full names, with parts as kohya names them."""
    parts: dict[str, Tensor] = {}
    for module, one in lora.items():
        parts |= {f"{module}.lora_up.weight": one.up, f"{module}.lora_down.weight": one.down}
        parts[f"{module}.alpha"] = torch.tensor(one.alpha)
    save_file({key: one.contiguous() for key, one in parts.items()}, path)
    return path


def with_text_model(component: str, module: str) -> str:
    """The name that a module of a text encoder had before version 5 of transformers, and has for trainers."""
    return f"text_model.{module}" if component.startswith("text") and "text_model" not in module else module


def by_kohya(case: Case) -> dict[str, Factors]:
    """The LoRA by diffusers' names with underscores."""
    return {
        KOHYA[case.name][component] + with_text_model(component, module).replace(".", "_"): one
        for component, modules in case.lora.items()
        for module, one in modules.items()
    }


def by_originals(case: Case) -> dict[str, Factors]:
    """The LoRA of the denoiser by the original names: what is one tensor there has the factors of all its parts."""
    (component,) = set(case.lora) & {"unet", "transformer"}
    state = parts_of(case.base())[component].state_dict()
    infos = {key: TensorInfo(DType.F32, tuple(one.shape)) for key, one in state.items()}
    found = {}
    for key, one in to_original(find_arch(case.name), Spelling("diffusers", component), infos).tensors.items():
        modules = [piece.key.removesuffix(".weight") for piece in one.pieces]
        if key.endswith(".weight") and case.lora[component].keys() >= set(modules):
            parts = [(case.lora[component][module], piece) for module, piece in zip(modules, one.pieces, strict=True)]
            name = key.removeprefix("model.diffusion_model.").removesuffix(".weight")
            found["lora_unet_" + name.replace(".", "_")] = joined(parts, one.info.shape)
    return found


def joined(parts: Sequence[tuple[Factors, Piece]], shape: tuple[int, ...]) -> Factors:
    """Of a tensor that is made of rows of others, each with its LoRA."""
    ones = [1 for _ in shape[2:]]
    if len(parts) == 1:
        ((one, _),) = parts
        return Factors(one.up.reshape(*one.up.shape[:2], *ones), one.down.reshape(-1, *shape[1:]), one.alpha)
    ups = [one.up[piece.start : piece.stop] * (one.alpha / len(one.down)) for one, piece in parts]
    downs = torch.cat([one.down for one, _ in parts])
    return Factors(torch.block_diag(*ups), downs, float(len(downs)))


@pytest.mark.parametrize("base", BASES)
def test_what_diffusers_wrote_is_merged_as_diffusers_fuses_it(case: Case, base: str, tmp_path: Path) -> None:
    file = case.folder / "pytorch_lora_weights.safetensors"
    assert any("alpha_pattern" in text for text in rm.inspect(file).metadata.values())
    found = merged(case, file, tmp_path, base)
    near(states(found), states(case.fused))
    plain = states(case.base())
    changed = {key for key, one in states(found).items() if not torch.equal(one, plain[key])}
    assert changed == {f"{part}/{name}.weight" for part, modules in case.lora.items() for name in modules}


def test_the_image_is_the_same(case: Case, tmp_path: Path) -> None:
    found = image(case.kind, merged(case, case.folder / "pytorch_lora_weights.safetensors", tmp_path))
    torch.testing.assert_close(found, image(case.kind, case.fused), rtol=0.0, atol=1e-5)
    assert (found - image(case.kind, case.base())).abs().max() > 1e-3


@pytest.mark.parametrize("base", BASES)
def test_names_of_kohya(case: Case, base: str, tmp_path: Path) -> None:
    file = written(tmp_path / "kohya.safetensors", by_kohya(case))
    near(states(merged(case, file, tmp_path, base)), states(case.fused))


@pytest.mark.parametrize("base", BASES)
def test_original_names(case: Case, base: str, tmp_path: Path) -> None:
    denoiser = by_originals(case)
    others = {key: one for key, one in by_kohya(case).items() if key.startswith("lora_te")}
    file = written(tmp_path / "kohya.safetensors", denoiser | others)
    near(states(merged(case, file, tmp_path, base)), states(case.fused))


def read_by_diffusers(case: Case, file: Path) -> Any:
    """The pipeline with a file's LoRA, fused by diffusers."""
    pipe = case.base()
    pipe.load_lora_weights(str(file))
    return merged_by_diffusers(pipe, case.lora)


def of_one_alpha(lora: Mapping[str, Factors]) -> dict[str, Factors]:
    """The same LoRA with one alpha: diffusers loses those of attention and text encoders that are not the commonest."""
    return {key: Factors(one.up * (one.alpha / 2), one.down, 2.0) for key, one in lora.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sd1", "sdxl"], indirect=True)
def test_diffusers_reads_a_file_of_kohya_alike(case: Case, tmp_path: Path) -> None:
    """But for the label's embedding of SDXL, which diffusers does not find by its own name."""
    lora = {key: one for key, one in of_one_alpha(by_kohya(case)).items() if "add_embedding" not in key}
    file = written(tmp_path / "kohya.safetensors", lora)
    near(states(read_by_diffusers(case, file)), states(merged(case, file, tmp_path)))


@pytest.mark.parametrize("case", ["flux"], indirect=True)
def test_diffusers_reads_its_own_names_of_flux_with_underscores_alike(case: Case, tmp_path: Path) -> None:
    """Of attention alone: diffusers does not know all others."""
    lora = {key: one for key, one in by_kohya(case).items() if "_attn_" in key}
    file = written(tmp_path / "kohya.safetensors", lora)
    near(states(read_by_diffusers(case, file)), states(merged(case, file, tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sdxl"], indirect=True)
def test_diffusers_reads_original_names_of_sdxl_alike(case: Case, tmp_path: Path) -> None:
    file = written(tmp_path / "kohya.safetensors", of_one_alpha(by_originals(case)))
    found = read_by_diffusers(case, file)
    near(states(found), states(merged(case, file, tmp_path)))


@pytest.mark.parametrize("case", ["flux"], indirect=True)
def test_diffusers_reads_fused_attention_of_flux_alike(case: Case, tmp_path: Path) -> None:
    """Of double blocks: diffusers takes the first layer of a single block to be of Flux' real width, 3072."""
    double = {key: one for key, one in by_originals(case).items() if "double_blocks" in key}
    file = written(tmp_path / "kohya.safetensors", double)
    near(states(read_by_diffusers(case, file)), states(merged(case, file, tmp_path)))


@pytest.mark.parametrize("case", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)], indirect=True)
def test_names_of_old_attention_processors(case: Case, tmp_path: Path) -> None:
    parts: dict[str, Tensor] = {}
    for component, modules in case.lora.items():
        for module, one in modules.items():
            name, layer = f"{component}.{with_text_model(component, module)}".rsplit(".", 1)
            if component == "unet" and (
                found := re.fullmatch(r"(.+\.attn\d)\.(to_[qkv]|to_out)(\.0)?", f"{name}.{layer}")
            ):
                start = f"{found[1]}.processor.{found[2]}_lora"
            elif component != "unet" and "mlp" not in module:
                start = f"{name}.{layer}.lora_linear_layer"
            else:
                continue
            parts |= {f"{start}.up.weight": one.up * (one.alpha / len(one.down)), f"{start}.down.weight": one.down}
    file = tmp_path / "old.safetensors"
    save_file(parts, file)
    due = states(read_by_diffusers(case, file))
    near(states(merged(case, file, tmp_path)), due)
    assert sum(not torch.equal(one, due[key]) for key, one in states(case.base()).items()) == len(parts) / 2


@pytest.mark.parametrize("case", ["flux"], indirect=True)
def test_names_of_xlabs(case: Case, tmp_path: Path) -> None:
    """Made of attention alone, and what follows it in blocks of one stream; no alpha."""
    streams = {"img_attn": "1", "txt_attn": "2"}
    layers: dict[str, Factors] = {}
    for key, one in by_originals(case).items():
        found = re.fullmatch(r"lora_unet_double_blocks_(\d)_(img_attn|txt_attn)_(qkv|proj)", key)
        if found:
            layers[f"double_blocks.{found[1]}.processor.{found[3]}_lora{streams[found[2]]}"] = one
    whole = case.lora["transformer"]
    for block in range(2):
        single, start = f"single_transformer_blocks.{block}", f"single_blocks.{block}.processor"
        attention = [whole[f"{single}.attn.to_{way}"] for way in "qkv"]
        width = len(attention[0].up)
        pieces = [(one, Piece(name, 0, width)) for one, name in zip(attention, "qkv", strict=True)]
        layers[f"{start}.qkv_lora"] = joined(pieces, (3 * width, width))
        layers[f"{start}.proj_lora"] = whole[f"{single}.proj_out"]
    assert len(layers) == 2 * 4 + 2 * 2
    parts = {f"{name}.up.weight": one.up * (one.alpha / len(one.down)) for name, one in layers.items()}
    parts |= {f"{name}.down.weight": one.down for name, one in layers.items()}
    file = tmp_path / "xlabs.safetensors"
    save_file(parts, file)
    due = states(read_by_diffusers(case, file))
    for base in ("base", "base.safetensors"):
        near(states(merged(case, file, tmp_path / base, base)), due)
