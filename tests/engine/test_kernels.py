"""Kernels: traced methods give the bits of the methods themselves, by either executor, for any cut and any value."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import remelt as rm
from remelt.engine import device_executor, native, native_executor, sweeps, torch_executor
from remelt.engine.language import Kernel
from remelt.engine.sweeps import Kernels
from remelt.methods import METHODS
from remelt.planning import cost
from remelt.recipe.method import Mask, Number, Same, merge_method
from remelt.tensors import FROM_TORCH

NATIVE = pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built"))
EXECUTORS = ["torch", "device", NATIVE]
SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, -1e-45, 3.4e38, 65504.0, 1.0, -2.5, 0.1]

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
Expression = tuple[Any, ...]
current: list[Expression] = []


def value_of(tree: Any, values: dict[str, Any]) -> Any:
    if isinstance(tree, str):
        return values[tree]
    if isinstance(tree, float):
        return tree
    name, *parts = tree
    return OPERATIONS[name](*[value_of(part, values) for part in parts])


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "add in place": lambda a, b: a.clone().add_(b),
    "reversed": lambda a, b: 1.5 - a / b,
    "scaled": lambda a, b: torch.add(a, b, alpha=0.3),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "far lerp": lambda a, b: torch.lerp(a, b, 0.8),
    "masked lerp": lambda a, b: torch.lerp(a, b, b.abs()),
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "clamp": lambda a, b: torch.clamp(a + b, -1.0, 1.0),
    "choose": lambda a, b: torch.where((a > b) & ~(b == 0.0) | (a != a), a, b - a),
    "count as float": lambda a, b: a * ((a <= b).float() + (a.sign() == b.sign()).float()),
    "neg": lambda a, b: -a,
    "abs": lambda a, b: a.abs(),
    "sqrt": lambda a, b: (a * a + b.square()).sqrt(),
    "through float64": lambda a, b: (a.double() * b.double() + 1e-9).float(),
    "exp": lambda a, b: torch.exp(-a.abs()),
}
leaves = st.sampled_from(["a", "b", "c"])
trees = st.recursive(
    leaves,
    lambda below: st.tuples(st.sampled_from(sorted(OPERATIONS)), below, st.one_of(below, st.just("alpha_a"))),
    max_leaves=9,
)


@merge_method(cut="element", workspace=32.0)
def specimen_expression(a: Same, b: Same, c: Same, *, alpha: Mask = 0.5, beta: Number = 2.0) -> Same:
    """Whatever the test asks for.

    Formula: the current tree

    Spaces: any

    Source: this test
    """
    result: Any = value_of(current[0], {"a": a, "b": b, "c": c, "alpha_a": a * (1.0 - alpha) + beta})
    return result + 0.0 * b


@pytest.fixture(autouse=True, scope="module")
def known() -> None:
    METHODS.find("weighted_sum")
    METHODS.add_module(sys.modules[specimen_expression.function.__module__])


def tensors(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    mixed = special[torch.randint(len(SPECIAL), (777,), generator=drawn)]
    return {
        "blocks.0.empty": torch.empty(0, 3, dtype=dtype),
        "blocks.0.scalar": torch.randn((), generator=drawn).to(dtype),
        "blocks.1.odd": torch.randn(131, generator=drawn).to(dtype),
        "blocks.1.large": torch.randn(70_001, generator=drawn).to(dtype),
        "blocks.2.special": mixed.to(dtype),
    }


def padded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Flat tensors with zeros at their ends: torch rounds some operations otherwise in what is left of a vector."""
    return {
        key: torch.nn.functional.pad(tensor.reshape(-1).double(), (0, -tensor.numel() % 64)).to(tensor.dtype)
        for key, tensor in tensors.items()
    }


def merged(recipe: Any, executor: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, torch.Tensor]:
    with monkeypatch.context() as patch:
        patch.setenv("REMELT_EXECUTOR", "torch" if executor == "methods" else executor)
        if executor == "methods":
            patch.setattr(sweeps.Kernels, "of", lambda *_: None)
        return rm.merge(recipe, nonfinite="keep", **options)  # type: ignore[no-any-return]


def differing(found: dict[str, torch.Tensor], due: dict[str, torch.Tensor]) -> list[str]:
    """The keys whose bits differ; any NaN is as good as another."""
    assert list(found) == list(due)
    return [
        key
        for key, tensor in found.items()
        if tensor.dtype != due[key].dtype
        or tensor.shape != due[key].shape
        or not torch.equal(tensor.isnan(), due[key].isnan())
        or not torch.equal(
            tensor.nan_to_num(1.0).reshape(-1).view(torch.uint8), due[key].nan_to_num(1.0).reshape(-1).view(torch.uint8)
        )
    ]


@pytest.mark.parametrize("executor", EXECUTORS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tree=trees,
    dtypes=st.lists(
        st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), min_size=3, max_size=3
    ),
    compute=st.sampled_from(["float32", "float32", "float64"]),
    threads=st.integers(1, 8),
    tile=st.sampled_from([2**power for power in range(12, 23)]),
    reading=st.sampled_from(["map", "read", "memory"]),
)
def test_a_kernel_gives_the_bits_of_its_methods(
    tree: Expression,
    dtypes: list[torch.dtype],
    compute: str,
    threads: int,
    tile: int,
    reading: str,
    executor: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    current[:] = [tree]
    if "float" in str(tree):  # these make float32 of anything
        compute = "float32"
    models = [tensors(seed, dtype) for seed, dtype in enumerate(dtypes)]
    alpha = rm.keys({"blocks.0.*": 0.25, "blocks.1.*": 0.7}) | 0.4

    def recipe_of(a: Any, b: Any, c: Any) -> Any:
        return METHODS["specimen_expression"](a, rm.weighted_sum(b, c, alpha=alpha), c, alpha=alpha)

    whole = recipe_of(*[rm.model(padded(model)) for model in models])
    due = merged(whole, "methods", monkeypatch, compute_dtype=compute, threads=1)
    due = {key: due[key][: tensor.numel()].reshape(tensor.shape) for key, tensor in models[0].items()}
    folder = tmp_path_factory.getbasetemp()
    with monkeypatch.context() as patch:
        use_tiles(patch, tile)
        if reading == "memory":
            found = merged(
                recipe_of(*map(rm.model, models)), executor, monkeypatch, compute_dtype=compute, threads=threads
            )
        else:
            patch.setenv("REMELT_READ", reading)
            paths = [folder / f"kernel-{place}.safetensors" for place in range(3)]
            for path, model in zip(paths, models, strict=True):
                save_unaligned(model, path)
            output = folder / "kernel-out.safetensors"
            options = {"compute_dtype": compute, "threads": threads, "output": output, "overwrite": True}
            merged(recipe_of(*map(rm.model, paths)), executor, monkeypatch, **options)
            loaded = load_file(output)
            found = {key: loaded[key] for key in due}
    assert differing(found, due) == []


def use_tiles(patch: pytest.MonkeyPatch, tile: int) -> None:
    """Have every executor work in pieces of so many elements."""
    patch.setattr(cost, "TILE", tile)
    patch.setattr(cost, "SMALLEST_TILE", min(tile, cost.SMALLEST_TILE))
    patch.setattr(native_executor, "SLICE", tile)
    patch.setattr(native_executor, "COPIED", tile)
    patch.setattr(device_executor, "DEVICE_TILE", tile)
    patch.setattr(torch_executor, "_TILE", tile)
    patch.setattr(torch_executor.DirectExecutor, "tile", tile)


def save_unaligned(model: dict[str, torch.Tensor], path: Path) -> None:
    """A file whose tensors begin at odd offsets, where the format allows that."""
    data, end = b"", 0
    header: dict[str, Any] = {}
    for key, tensor in {"odd": torch.zeros(1, dtype=torch.uint8), **model}.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        dtype = FROM_TORCH[tensor.dtype].name
        header[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + len(raw)]}
        data, end = data + raw, end + len(raw)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Kernel | None]:
    """The kernels that are made, None where a method could not be traced."""
    made: list[Kernel | None] = []
    trace = sweeps.trace

    def noted(*arguments: Any) -> Kernel | None:
        made.append(trace(*arguments))
        return made[-1]

    monkeypatch.setattr(sweeps, "trace", noted)
    return made


def names(kernel: Kernel | None) -> list[str]:
    assert kernel is not None
    return [operation.name for operation in kernel.operations]


def test_one_trace_serves_all_blocks(traced: list[Kernel | None]) -> None:
    a, b = (rm.model({f"blocks.{i}.w": torch.randn(8) for i in range(6)}) for _ in "ab")
    weights = rm.keys({f"blocks.{i}.*": 0.1 * (i + 1) for i in range(6)}) | 0.5
    rm.merge(rm.weighted_sum(a, b, alpha=weights), threads=1)
    assert [names(kernel) for kernel in traced] == [["load", "load", "lerp"]]


def test_a_whole_recipe_is_one_kernel_and_shared_work_is_done_once(traced: list[Kernel | None]) -> None:
    a, b, c = (rm.model({"w": torch.randn(8)}) for _ in "abc")
    delta = b - c
    rm.merge(rm.add_difference(rm.add_difference(a, delta, alpha=0.5), 0.5 * delta, alpha=1.0), threads=1)
    assert names(traced[0]) == ["load", "load", "sub", "mul", "load", "add", "add"]


def test_reductions_that_a_number_makes_idle_are_left_out(traced: list[Kernel | None]) -> None:
    models = [rm.model({"w": torch.randn(70)}) for _ in "abc"]
    deltas = [model - models[0] for model in models[1:]]
    for k, passes in ((1.0, 1), (0.5, 5)):
        recipe = models[0] + rm.ties_sum(*deltas, k=k)
        assert [len(planned.passes.passes) for planned in rm.plan(recipe).tasks] == [passes]
        rm.merge(recipe)
    assert traced[0] is not None


def test_a_method_that_decides_by_a_number_is_run_as_it_is(
    traced: list[Kernel | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = (rm.model({"blocks.0.w": torch.randn(9), "blocks.1.w": torch.randn(9)}) for _ in "abc")
    recipe = rm.clamp(a, b, c, stiffness=rm.keys({"blocks.0.*": 0.5}) | 0.0)
    due = merged(recipe, "methods", monkeypatch)
    assert differing(rm.merge(recipe, threads=1), due) == []
    assert traced == [None]


def test_an_impure_method_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def changing(a: Any, b: Any) -> Any:
        calls.append(1)
        return a * float(len(calls))

    monkeypatch.setitem(OPERATIONS, "add", changing)
    current[:] = [("add", "a", "b")]
    a, b, c = (rm.model({"w": torch.ones(70)}) for _ in "abc")
    rm.merge(METHODS["specimen_expression"](a, b, c), threads=1)
    assert len(calls) == 3, "traced, tried on a sample, found unlike, and called for the tile"


@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_is_not_finite_is_told_whichever_executor_meets_it(executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    a = {"v": torch.ones(100, dtype=torch.float16), "w": torch.ones(100, dtype=torch.float16)}
    bad = {"v": torch.ones(100, dtype=torch.float16), "w": torch.full((100,), 60000.0, dtype=torch.float16)}
    bad["v"][37] = float("inf")
    with pytest.raises(rm.NonFiniteError) as caught:
        rm.merge(rm.model(bad, name="bad") + (rm.model(bad, name="bad") - rm.model(a, name="good")), threads=2)
    assert "bad: NaN or infinity in 1 tensor: v" in str(caught.value)
    assert "result: w overflows F16" in str(caught.value)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_a_type_cuts_off_is_told(executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    a, b = {"v": torch.full((70,), 448.0), "w": torch.ones(70)}, {"v": torch.ones(70), "w": torch.ones(70)}
    mixed = rm.weighted_sum(rm.model(a), rm.model(b), alpha=0.5)
    assert rm.merge(mixed, dtype="fp8_e4m3")["v"].float()[0] == 224.0
    a["v"][69] = 1000.0
    with pytest.raises(rm.NonFiniteError, match="result: v overflows F8_E4M3"):
        rm.merge(mixed, dtype="fp8_e4m3")


def test_an_executor_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", "abacus")
    with pytest.raises(rm.OptionError, match="REMELT_EXECUTOR is native, torch or device, but it is 'abacus'"):
        rm.merge(rm.model({"w": torch.ones(2)}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["lerp", "add", "sub", "mul", "div"])
def test_operations_on_halves_are_those_on_floats_rounded(name: str, dtype: torch.dtype) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    other = bits[torch.randperm(2**16, generator=torch.Generator().manual_seed(1))]
    function = getattr(torch, name)
    pairs: list[tuple[Any, ...]] = [(bits, other), (bits, 0.3), (bits, -1.7)]
    if name in ("add", "sub"):  # a number would be rounded to a half first
        pairs = pairs[:1]
    if name == "lerp":
        pairs = [(bits, other, weight) for weight in (0.0, 0.3, 0.5, 0.8, 1.0, -0.2, 1.5)]
    for operands in pairs:
        floats = function(*[o.float() if isinstance(o, torch.Tensor) else o for o in operands]).to(dtype)
        assert differing({"": function(*operands)}, {"": floats}) == []


def test_two_numbers_by_block_make_one_number() -> None:
    """Arithmetic between numbers that differ by key is written down, as that with tensors is."""
    kernels: list[Any] = []
    real = Kernels._make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernels, "_make", lambda *given: kernels.append(real(*given)) or kernels[-1])
        a, b = (
            rm.model({"layers.0.x.w": torch.full((300,), float(n)), "layers.1.x.w": torch.ones(300)}) for n in (1, 3)
        )
        weights = [rm.keys({"layers.0.*": 3.0}) | 1.0, rm.keys({"layers.0.*": 1.0}) | 2.0]
        found = rm.merge(rm.n_average(a, b, weights=weights))
    assert float(found["layers.0.x.w"][0]) == 1.5
    assert kernels
    assert all(kernel is not None for kernel in kernels)
