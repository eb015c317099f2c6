"""What a result has beside its tensors: metadata, configurations where no model gives any, and what is missing."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from remelt.api.dialect_views import left_out_of
from remelt.api.modelspec import model_spec, use_of
from remelt.api.options import MergeOptions
from remelt.archs.arch import Arch
from remelt.archs.configurations import Configurations, Use, configurations
from remelt.archs.dialects import Spelling
from remelt.check.inputs import Input
from remelt.core.tensor_info import TensorInfo
from remelt.planning.plan import PlannedOutput

LIKE = "--like FOLDER takes"
"""What warnings of files that are missing say, as a remedy."""
ENTRY = "--modelspec prediction_type epsilon"
"""What they say of a model that they know too little of."""
_FOLDERS = "diffusers"


@dataclass(frozen=True)
class Description:
    """A result of some ``models``, with its ``tensors`` in a spelling; ``arch`` is the first model's."""

    models: Sequence[Input]
    tensors: Mapping[str, TensorInfo]
    arch: Arch | None
    spelling: Spelling
    options: MergeOptions

    @functools.cached_property
    def _markers(self) -> frozenset[str]:
        """The keys of the result, and those of its models for which its layout has no place."""
        return frozenset({*self.tensors, *(key for one in self.models for key in left_out_of(one.checkpoint))})

    @functools.cached_property
    def _use(self) -> Use:
        return use_of(self.models, self._markers, self.options.modelspec)

    def metadata(self, *, hashed: bool) -> dict[str, str]:
        """What sites and user interfaces are told of it."""
        title, asked = self.options.title, self.options.modelspec
        return model_spec(self.models, self._markers, self.spelling.dialect, title=title, asked=asked, hashed=hashed)

    def configurations(self, output: PlannedOutput, folder: Path | None) -> Configurations | None:
        """What diffusers is told of it; None where a model's ``folder`` tells that, or it is no folder of diffusers."""
        arch, spelling = self.arch, self.spelling
        if output.layout is None or not output.layout.is_folder or output.space != "weight" or _has_any(folder):
            return None
        if arch is None or spelling.dialect != _FOLDERS or spelling.start:
            return None
        alone = next((_folder_of(arch, name) for name in [spelling.alone] if name), "")
        found = configurations(arch.name, alone, self.tensors, self._use)
        return found or Configurations({}, (), (spelling.alone or arch.name,))

    def missing(self, output: PlannedOutput, folder: Path | None) -> Iterator[str]:
        """Warnings about what it lacks before diffusers loads it, with the remedy."""
        found = self.configurations(output, folder)
        if found is None:
            return
        if found.untold:
            yield f"no configuration is known of {', '.join(found.untold)}: {LIKE} it from a model of the same shapes"
        if found.tokenizers:
            named, them = ", ".join(found.tokenizers), "them" if len(found.tokenizers) > 1 else "it"
            are = "are" if len(found.tokenizers) > 1 else "is"
            yield (
                f"{named} {are} in no checkpoint, and diffusers asks for {them}: {LIKE} {them} from a model of the "
                "same make"
            )
        guessed = "scheduler/scheduler_config.json" in found.files and not self._use.prediction
        if guessed and self.arch is not None and self.arch.name == "sd2":
            yield f"nothing tells what the model predicts, and its scheduler is told velocity: {ENTRY} tells noise"


def _folder_of(arch: Arch, name: str) -> str:
    """The folder of a component in diffusers' layout."""
    parts = [part for component in arch.components if component.name == name for part in component.dialects]
    return next((part.folder for part in parts if part.dialect == _FOLDERS), name)


def _has_any(folder: Path | None) -> bool:
    """Whether a model's folder has a configuration of it, or of a component."""
    if folder is None or not folder.is_dir():
        return False
    names = ("config.json", "model_index.json")
    return any(found.is_file() for name in names for found in (*folder.glob(name), *folder.glob(f"*/{name}")))
