"""Results that are adapters, on their way to a plan: whose names they have, where they go, what stands beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path

from torch import Tensor

from remelt.adapters.factors import chosen_rank
from remelt.adapters.settings import CONFIG, WEIGHTS
from remelt.adapters.written import Written
from remelt.api.adapter_outputs import AdapterOutput
from remelt.api.adapter_views import first_adapter, names_of
from remelt.api.options import MergeOptions
from remelt.api.outputs import GGUF, SUFFIX, output_path, refuse_output
from remelt.check.inputs import Input
from remelt.check.keys import KeyReport
from remelt.check.report import fold_keys
from remelt.check.spaces import name_of
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.errors import OptionError, RecipeError
from remelt.formats.layout import OutputLayout, file_layout, folder_layout
from remelt.planning.plan import PlannedOutput
from remelt.recipe.adapter import AdapterForm

_SHORT = (DType.F16, DType.BF16)
_OF_PRODUCTS = 1e-15
"""What squares of singular values are beside the largest by round-off."""


class Measure(Enum):
    """What is found out of a difference before its factors are planned: what changed, or the energy by rank, too."""

    CHANGE = "change"
    ENERGY = "energy"


class Adapted:
    """A result that is an adapter: a file, or where its names are PEFT's a folder, unless a file is asked for."""

    measures: Measure | None = None
    is_settled = True
    """Whether its modules are known to be those that change."""

    def __init__(self, written: Written | None, modules: Mapping[str, int]) -> None:
        self._written, self._modules = written, modules

    @property
    def written(self) -> Written:
        """How its modules are named, once that is known."""
        assert self._written is not None
        return self._written

    @property
    def modules(self) -> Mapping[str, int]:
        """The rank of each module, by its name."""
        return self._modules

    def measuring(self) -> Adapted:
        """What finds out what changes, where that is not known."""
        return self

    def settled(self, squares: Mapping[str, Tensor]) -> Adapted:
        """The same with what was found out."""
        return self

    def refuse_others(self, count: int, mass: float | None) -> None:
        """Raise `RecipeError` where it is one of several results that are merged together, or is made of no such."""

    def settle(self, first: Input, inputs: Mapping[int, Input], options: MergeOptions) -> str | None:
        """Choose the names by the first model; the dialect of which they are made."""
        return None

    def tasks(self, report: KeyReport) -> KeyReport:
        """The tasks of the adapter's tensors."""
        return report

    def path(self, asked: Path, *, overwrite: bool) -> Path:
        """Where it goes; `OutputError` where something is there."""
        if asked.suffix == GGUF:
            raise OptionError(
                f"an adapter is written as safetensors, but the output is {asked.name}", hint=f"-o {asked.stem}{SUFFIX}"
            )
        found = output_path(asked, folder=self.written.names == "peft")
        refuse_output(found, overwrite)
        return found

    def lay_out(self, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], path: Path) -> OutputLayout:
        """One file, or for PEFT a folder."""
        told = {**metadata, **self.written.metadata(self.modules)}
        if path.suffix == SUFFIX:
            return OutputLayout(files=(file_layout(tensors, told, path.name),), indexes=(), is_folder=False)
        return folder_layout(tensors, told, max_shard_size=None, weight_names={"": WEIGHTS})

    def companions(self, output: PlannedOutput) -> Iterator[tuple[bytes, str]]:
        """PEFT's configuration, in a folder."""
        config = self.written.config(self.modules)
        if config is not None and output.layout is not None and output.layout.is_folder:
            yield (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(), CONFIG

    def warnings(self) -> Iterator[str]:
        """What the adapter does not hold."""
        yield from ()


class Extracted(Adapted):
    """A difference as an adapter. Until it ``is_settled``, its modules are all that could change.

    ``ranks`` are those of keys. So are ``shares`` and ``energies``; ``left`` is what differs without having a place, by
    its squared norm, where that was measured.
    """

    def __init__(
        self, form: AdapterForm, *, measures: Measure | None = None, ranks: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(None, {})
        if measures is None and ranks is None and form.rank is None and form.energy is not None:
            measures = Measure.ENERGY  # without it nobody knows how large the adapter is
        self.form, self.measures, self.ranks = form, measures, ranks
        self.is_settled = ranks is not None
        self.output: AdapterOutput | None = None
        self.shares: dict[str, float] = {}
        self.energies: dict[str, float] = {}
        self.left: dict[str, float] = {}

    @property
    def made(self) -> AdapterOutput:
        """What it is made of, once its names are chosen."""
        assert self.output is not None
        return self.output

    @property
    def written(self) -> Written:
        """How its modules are named."""
        return self.made.written

    @property
    def modules(self) -> Mapping[str, int]:
        """The rank of each module, by its name."""
        return self.made.modules

    def refuse_others(self, count: int, mass: float | None) -> None:
        """Raise `RecipeError` where it is one of several results that are merged together, or no difference."""
        if count > 1:
            raise RecipeError(
                "recipes that share models are merged together, but one of them is to be an adapter",
                hint="merge it by itself",
            )
        if name_of(mass) != "delta":
            hint = "to_lora(tuned - base, rank=32)"
            raise RecipeError("an adapter is made of a difference, but this is a model", hint=hint)

    def settle(self, first: Input, inputs: Mapping[int, Input], options: MergeOptions) -> str | None:
        """Choose the names by the arch of the first model, or by the adapter that is changed itself."""
        for name, given in (("dialect", options.dialect), ("max_shard_size", options.max_shard_size)):
            if given is not None:
                raise OptionError(
                    f"{name} is for models, but the result is an adapter, which is one file with names of its own",
                    hint='to_lora(..., names="diffusers")' if name == "dialect" else "leave it out",
                )
        written, dtype = Written.of(self.form.names, first.detection.arch), None
        if first.adapter is not None and first.detection.arch is None:
            written = names_of(first)
            if self.form.names not in (None, written.names):
                raise OptionError(
                    f"without a model nobody can tell how {self.form.names} names the modules of {first.label}",
                    hint=f'adapter("{first.model.name}", base="...") names one',
                )
        if first.adapter is not None and options.stored is None:
            stored = first_adapter(first).stored
            dtype = stored if stored in _SHORT else None
        deltas = frozenset(index for index, given in inputs.items() if given.model.space == "delta")
        self.output = AdapterOutput(self.form, written, self.ranks, dtype, deltas)
        return written.dialect

    def tasks(self, report: KeyReport) -> KeyReport:
        """The tasks of the difference, turned into those of its factors, or of what is to be known of them."""
        if self.measures is None:
            return self.made.tasks(report)
        return self.made.measuring(report, energy=self.measures is Measure.ENERGY)

    def measuring(self) -> Extracted:
        """What finds out which weights change, or what this was made to find out."""
        if self.measures is not None:
            return self
        return Extracted(self.form, measures=Measure.CHANGE if self.form.energy is None else Measure.ENERGY)

    def settled(self, squares: Mapping[str, Tensor]) -> Extracted:
        """The same with what was measured: squares of singular values by key, or of norms.

        Raises `RecipeError` where nothing changed.
        """
        ranks: dict[str, int] = {}
        found = Extracted(self.form, ranks=ranks)
        for key, one in squares.items():
            total = float(one.sum())
            if key not in self.made.measured:
                found.left |= {key: total} if total else {}
                continue
            found.energies[key] = total
            if total > 0.0:  # what was not changed is no module of the adapter
                ranks[key] = self._rank(one)
                if self.measures is Measure.ENERGY:
                    found.shares[key] = float(one[: ranks[key]].sum()) / total
        if not ranks:
            raise RecipeError("there is nothing to make an adapter of: both models have the same weights")
        return found

    def _rank(self, squares: Tensor) -> int:
        if self.form.kind == "lokr":
            return 1
        if self.measures is Measure.CHANGE:
            assert self.form.rank is not None
            return self.form.rank
        return chosen_rank(squares, self.form.rank, self.form.energy, _OF_PRODUCTS)

    def warnings(self) -> Iterator[str]:
        """What the adapter does not hold, or what is not known of it."""
        if self.measures is not None:
            yield "ranks by energy are found first: what is written is planned once they are known"
        left = self.made.left
        if left and self.ranks is None and self.measures is None:
            told = "where they differ, they are left out"
            yield f"{len(left)} tensors are no linear maps or convolutions: {told}: {fold_keys(left)}"
