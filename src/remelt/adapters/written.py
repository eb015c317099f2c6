"""How an adapter is written: names of modules and parts, and the metadata by which other tools read it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from remelt.adapters.extraction import ALPHA
from remelt.adapters.settings import Settings
from remelt.archs.arch import Arch
from remelt.archs.dialects import ORIGINAL
from remelt.formats.checkpoint import Checkpoint

_LIKE_DIFFUSERS = ("sd1", "sd2", "sdxl")
"""Archs whose modules kohya's trainer, or what reads its files, names as diffusers does."""
_KOHYA = {
    "unet": "lora_unet_",
    "transformer": "lora_unet_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
}
_PEFT = "base_model.model."
_DENOISERS = ("unet", "transformer")
_FOLDERS = (*_KOHYA, "text_encoder")
_WRAPPED = "text_model."
"""What encloses the layers of CLIP in older versions of transformers, but not in newer ones."""
_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "sd3": "sd3", "flux": "flux1"}
_ENCLOSED = "transformer."
"""What a single file puts a text encoder of transformers into."""
WEIGHT = ".weight"
_STILL_TRUE = ("task_type", "base_model_name_or_path", "revision", "auto_mapping", "fan_in_fan_out")
"""What a configuration of PEFT says of the model that is changed, whatever the adapter's ranks."""


@dataclass(frozen=True)
class Written:
    """How the modules of a model are named in an adapter: by whom, and from keys of which dialect."""

    names: str
    arch: Arch | None
    own: bool = False
    """Whether keys are an adapter's own names of modules."""
    before: Mapping[str, Any] = field(default_factory=dict)
    """PEFT's configuration of the adapter whose names they are."""

    @staticmethod
    def like(adapter: Checkpoint) -> Written:
        """By the names of another adapter, as they are; as PEFT's where it has a configuration."""
        if not any(".lora_A." in key or ".lora_embedding_A" in key for key in adapter.tensors):
            return Written("kohya", None, own=True)
        before = Settings.of(adapter.path, adapter.metadata).configs.get("", {})
        return Written("peft" if before else "diffusers", None, True, before)

    @staticmethod
    def of(names: str | None, arch: Arch | None) -> Written:
        """By those names, or by the usual ones of an arch: kohya's where diffusers has pipelines of it, else PEFT's."""
        return Written(names or ("kohya" if _is_of_images(arch) else "peft"), arch)

    @property
    def dialect(self) -> str | None:
        """The dialect whose keys are named; None for the model's own."""
        if self.arch is None or not any(component.dialects for component in self.arch.components):
            return None
        if self.names != "kohya" or self.arch.name in _LIKE_DIFFUSERS:
            return "diffusers"  # PEFT wraps the modules of diffusers and transformers
        return ORIGINAL

    def module(self, key: str) -> str | None:
        """What the module of a weight is called; None where adapters of that kind leave it alone.

        >>> Written("peft", None).module("model.layers.0.mlp.up_proj.weight")
        'base_model.model.model.layers.0.mlp.up_proj'
        """
        if not key.endswith(WEIGHT):
            return None
        if self.own:
            return key.removesuffix(WEIGHT)
        folder, path = self._placed(key.removesuffix(WEIGHT))
        if folder.endswith("vae"):
            return None
        if self.names == "peft":  # of one component, as a rule the denoiser
            return f"{_PEFT}{path}" if folder in ("", *_DENOISERS) else f"{_PEFT}{folder}.{path}"
        if self.names == "diffusers":
            return f"{folder}.{path}" if folder else path
        if folder.startswith("text_encoder"):
            path = path.removeprefix(_ENCLOSED)
        return self._kohya(folder) + path.replace(".", "_")

    def parts(self, *, of_embedding: bool = False) -> Mapping[str, str]:
        """What the parts of a module are called that remelt writes; PEFT has other names for tables of vectors."""
        if of_embedding:
            return {"up": "lora_embedding_B", "down": "lora_embedding_A"}
        if self.names == "kohya":
            return {"up": "lora_up.weight", "down": "lora_down.weight", "alpha": "alpha"}
        return {"up": "lora_B.weight", "down": "lora_A.weight"}

    def metadata(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """What the header says, by the ranks of modules; they are multiplied by nothing else."""
        if self.names == "diffusers":
            return self._of_folders(ranks)
        if self.names == "peft" or not any(ranks.values()):  # a LoKr of whole matrices has no rank
            return {}
        common = _most(ranks)
        found = {"ss_network_module": "networks.lora", "ss_network_dim": str(common)}
        found["ss_network_alpha"] = str(float(ALPHA))
        if self.arch is None:
            return found
        found["ss_base_model_version"] = _VERSIONS.get(self.arch.name, self.arch.name)
        spec = dict(self.arch.modelspec)
        if "architecture" in spec:
            found["modelspec.architecture"] = f"{spec['architecture']}/lora"
            found["modelspec.sai_model_spec"] = "1.0.1"
        return found

    def config(self, ranks: Mapping[str, int]) -> dict[str, object] | None:
        """PEFT's configuration, which stands beside the file; None for other names."""
        if self.names != "peft":
            return None
        inside = {name.removeprefix(_PEFT): rank for name, rank in ranks.items()}
        told: dict[str, object] = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
        }
        told |= {"bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": False, "use_rslora": False, "use_dora": False}
        told |= {name: self.before[name] for name in _STILL_TRUE if name in self.before}
        return told | self._config(inside)

    def _of_folders(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """Diffusers' configurations, one for each folder; none where modules do not say of which they are.

        It knows a module by the end of its path, which is the same whatever encloses the layers of a text encoder.
        """
        inside: dict[str, dict[str, int]] = {}
        for name, rank in ranks.items():
            folder, _, path = name.partition(".")
            if folder not in _FOLDERS:
                return {}
            inside.setdefault(folder, {})[path.removeprefix(_WRAPPED)] = rank
        told = {f"{folder}.{name}": one for folder, some in inside.items() for name, one in self._config(some).items()}
        return {"lora_adapter_metadata": json.dumps(told, sort_keys=True)}

    def _config(self, ranks: Mapping[str, int]) -> dict[str, object]:
        common = _most(ranks)
        others = {_pattern(name, ranks): rank for name, rank in ranks.items() if rank != common}
        return {
            "r": common,
            "lora_alpha": common,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted(ranks),
        }

    def _placed(self, path: str) -> tuple[str, str]:
        """The folder of diffusers that a module belongs to, and its path there or in the component of the original."""
        folder, slash, rest = path.rpartition("/")
        if slash:
            return folder, rest
        components = [] if self.arch is None else self.arch.components
        if not any(one.folder for component in components for one in component.dialects):
            return "", path  # a model of one piece, whose modules are named from its root
        for component in components:
            for prefix in component.prefixes:
                if path.startswith(prefix):
                    folders = [one.folder for one in component.dialects if one.folder]
                    return folders[0] if folders else component.name, path[len(prefix) :]
        return "", path

    def _kohya(self, folder: str) -> str:
        several = self.arch is not None and sum(
            any(one.folder.startswith("text_encoder") for one in component.dialects)
            for component in self.arch.components
        )
        if folder == "text_encoder":
            return "lora_te1_" if several and several > 1 else "lora_te_"
        if folder == "text_encoder_2" and self.arch is not None and self.arch.name in ("flux", "chroma"):
            return "lora_te3_"
        return _KOHYA.get(folder, "lora_unet_")


def _is_of_images(arch: Arch | None) -> bool:
    return arch is not None and any(
        one.folder in _DENOISERS for component in arch.components for one in component.dialects
    )


def _pattern(path: str, paths: Iterable[str]) -> str:
    """A pattern that a path alone has the end of, among others."""
    return f"^{re.escape(path)}" if any(other.endswith(f".{path}") for other in paths) else path


def _most(ranks: Mapping[str, int]) -> int:
    """The rank that most modules have."""
    return Counter(ranks.values()).most_common(1)[0][0] if ranks else 0
