"""A case in the real engine, on models in memory, and the result that the method by itself says is due."""

from __future__ import annotations

from collections.abc import Mapping
from unittest.mock import patch

import torch
from torch import Tensor

from remelt.api.merging import Merged, run_prepared
from remelt.api.options import MergeOptions
from remelt.api.prepare import prepare
from remelt.api.recipes import load_recipe
from remelt.core.dtype import DType
from remelt.engine import units as engine_units
from remelt.methods import METHODS
from remelt.planning import cost
from remelt.recipe.node import Call, Node, as_node, model
from remelt.tensors import TORCH
from remelt.testing.cases import Case

Model = dict[str, Tensor]

RUNS = ((2**17, 2**22, 1), (64, 2**22, 2), (2**12, 2**14, 3), (2**16, 2**16, 2))
"""Elements of a tile, elements of a slice that one thread takes, and threads."""


def models_of(case: Case, dtype: torch.dtype) -> list[Model]:
    """One model for each operand, of the case's shapes."""
    found: list[Model] = [{} for _ in case.slots]
    for seed, (key, shape) in enumerate(case.shapes.items()):
        for held, tensor in zip(found, case.operands(shape, dtype, seed), strict=True):
            held[key] = tensor
    return found


def call_of(case: Case, operands: list[Node], dtype: torch.dtype = torch.float32) -> Node:
    """The recipe that calls the method on operands, with the case's settings."""
    args, kwargs = case.arguments(operands)
    made = case.method(*args, **{name: value for name, value in kwargs.items() if value is not None})
    if case.method.returns != "mask":
        return made
    shapes = case.shapes.items()
    ones = model({key: torch.ones(shape, dtype=dtype) for key, shape in shapes}, space="delta", name="ones")
    return Call("multiply", (ones, made))


def merge_in_engine(
    case: Case, models: list[Model], spaces: list[str], *, dtype: torch.dtype, tile: int, slice_size: int, threads: int
) -> Model:
    """The merge of the case's models by the engine, at a tile size and a number of threads."""
    operands: list[Node] = [
        as_node(model(tensors, space=space, name=f"operand{number}"))
        for number, (tensors, space) in enumerate(zip(models, spaces, strict=True))
    ]
    options = MergeOptions(compute_dtype=str(dtype).removeprefix("torch."), threads=threads, nonfinite="keep")
    methods = {**METHODS, case.method.name: case.method}
    with (
        patch.object(cost, "TILE", tile),
        patch.object(cost, "SMALLEST_TILE", min(tile, cost.SMALLEST_TILE)),
        patch.object(engine_units, "SLICE", slice_size),
        prepare([load_recipe(call_of(case, operands, dtype))], [None], options, methods) as prepared,
    ):
        for event in run_prepared(prepared, options):
            if isinstance(event, Merged):
                return event.tensors[0]
    raise AssertionError("the engine ends with a result, but gave none")


def expected_of(case: Case, models: list[Model]) -> Model:
    """What the engine must give: the method by itself on every key, or on every group of keys."""
    declaration = case.method.declaration
    result: Model = {}
    if declaration.keys is not None:
        result = dict(models[0])
        stored = None if declaration.stores is None else TORCH[declaration.stores]
        for group in declaration.keys(case.layout()):
            computed = group_result(case, models, group.inputs, group.outputs[0])
            result |= {key: tensor.to(stored or tensor.dtype) for key, tensor in computed.items()}
        return result
    facts, settings = case.facts(), case.settings
    names = [parameter.name for parameter in case.slots]
    idle = next((one for one in declaration.shortcuts if settings.get(one.parameter) == one.value), None)
    cast = None if declaration.casts is None else TORCH[DType.parse(settings[declaration.casts])]
    for key in case.shapes:
        if declaration.selects is None or declaration.selects(facts[key], settings):
            operands = [held[key] for held in models]
            made = case.apply(operands, key=key) if idle is None else operands[names.index(idle.result)]
            result[key] = made if cast is None else made.to(cast)
    return result


def group_result(case: Case, models: list[Model], inputs: tuple[str, ...], key: str) -> Mapping[str, Tensor]:
    """A method of cut ``model`` on one group of keys."""
    args, kwargs = case.arguments([{name: held[name] for name in inputs} for held in models])
    if "key" in case.method.given:
        kwargs["key"] = key
    found: Mapping[str, Tensor] = case.method.function(*args, **kwargs)
    return found
