"""The engine: every cut of method, the same bytes for any tile, thread and order, and the budget kept."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import remelt as rm
from remelt.api import merging
from remelt.engine import native
from remelt.engine import run as engine_run
from remelt.engine.finite import FiniteReport
from remelt.engine.known import Fold
from remelt.engine.run import Execution, _Run
from remelt.engine.units import Queue
from remelt.methods import METHODS
from remelt.methods.selection import HELD
from remelt.planning import cost


@pytest.fixture(scope="module")
def specimens() -> ModuleType:
    path = Path(__file__).with_name("specimens_of_methods.py")
    spec = importlib.util.spec_from_file_location("specimens_of_methods", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    METHODS.find("weighted_sum")
    METHODS.add_module(module)
    return module


def model(seed: int, size: int = 300_001) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "large": torch.randn(size, generator=generator),
        "left.w": torch.randn(7, 3, generator=generator),
        "right.w": torch.randn(7, 3, generator=generator),
        "scalar": torch.randn((), generator=generator),
        "empty": torch.empty(0, 4),
        "odd": torch.randn(131, generator=generator),
    }


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def use(tile: int, slice_size: int = cost.SLICE) -> None:
        from remelt.engine import native_executor, units

        monkeypatch.setattr(cost, "TILE", tile)
        monkeypatch.setattr(cost, "SMALLEST_TILE", min(tile, cost.SMALLEST_TILE))
        monkeypatch.setattr(units, "SLICE", slice_size)
        monkeypatch.setattr(native_executor, "SLICE", max(tile, cost.CHUNK))

    return use


def recipes(specimens: ModuleType) -> dict[str, Any]:
    a, b, c = (rm.model(model(seed), name=f"m{seed}") for seed in (1, 2, 3))
    s = specimens
    return {
        "element": rm.weighted_sum(a, b, alpha=0.3) + 0.7 * (b - c),
        "reduced": rm.slerp(rm.slerp(a, b, alpha=0.3), c, alpha=0.6),
        "two rounds": s.standardise(rm.weighted_sum(a, b)),
        "random": s.random_choice(a, s.random_choice(b, c, seed=3), probability=0.3, seed=5),
        "whole": rm.weighted_sum(s.sort_rows(rm.slerp(a, b)), c, alpha=0.25),
        "several keys": s.swap_sides(rm.weighted_sum(a, s.swap_sides(b))),
        "all": s.sort_rows(s.standardise(s.sort_rows(a))) + 0.5 * (s.swap_sides(b) - s.random_choice(b, c)),
    }


@pytest.mark.parametrize("name", ["element", "reduced", "two rounds", "random", "whole", "several keys", "all"])
def test_no_tile_slice_or_number_of_threads_changes_a_bit(name: str, specimens: ModuleType, tiles: Any) -> None:
    recipe = recipes(specimens)[name]
    expected = rm.merge(recipe, threads=1)
    for tile, slice_size, threads in ((64, 2**22, 1), (2**12, 2**14, 2), (2**16, 2**17, 3), (2**20, 2**22, 8)):
        tiles(tile, slice_size)
        found = rm.merge(recipe, threads=threads)
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert torch.equal(found[key].view(torch.int32), value.view(torch.int32)), (key, tile, threads)


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_threads_that_share_the_passes_of_a_large_tensor_change_no_bit(
    executor: str, specimens: ModuleType, tiles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if executor == "native" and not native.available():
        pytest.skip("the native executor is not built")
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    a, b = ({"w": torch.randn(2**23 + 77, generator=torch.Generator().manual_seed(seed)).half()} for seed in (1, 2))
    recipe = specimens.standardise(rm.slerp(rm.model(a), rm.model(b), alpha=0.3))
    expected = rm.merge(recipe, threads=1)
    for tile, threads in ((2**12, 2), (2**16, 3), (2**22, 8)):
        tiles(tile)
        found = rm.merge(recipe, threads=threads)
        assert torch.equal(found["w"].view(torch.int16), expected["w"].view(torch.int16)), (tile, threads)


def test_each_cut_computes_what_it_says(specimens: ModuleType) -> None:
    a, b = model(1), model(2)
    s = specimens
    swapped = rm.merge(s.swap_sides(rm.model(a)))
    assert torch.equal(swapped["left.w"], a["right.w"])
    assert torch.equal(swapped["right.w"], a["left.w"])
    assert torch.equal(swapped["large"], a["large"])
    nested = rm.merge(s.swap_sides(rm.weighted_sum(rm.model(a), s.swap_sides(rm.model(b)), alpha=0.25)))
    assert torch.equal(nested["left.w"], torch.lerp(a["right.w"], b["left.w"], 0.25))
    ordered = rm.merge(s.sort_rows(rm.model(a)))
    assert torch.equal(ordered["left.w"], a["left.w"].sort(dim=0).values)
    standard = rm.merge(s.standardise(rm.model(a)))["large"].double()
    assert abs(standard.mean()) < 1e-6
    assert abs(standard.std(correction=0) - 1) < 1e-6


def test_block_weights_reach_each_key_of_a_group(specimens: ModuleType) -> None:
    a, b = model(1), model(2)
    weights = rm.keys({"left.*": 0.0, "right.*": 1.0}) | 0.5
    mixed = rm.merge(specimens.swap_sides(rm.weighted_sum(rm.model(a), rm.model(b), alpha=weights)))
    assert torch.equal(mixed["left.w"], b["right.w"])
    assert torch.equal(mixed["right.w"], a["left.w"])


def test_random_masks_differ_by_key_and_by_seed(specimens: ModuleType) -> None:
    zeros, ones = ({f"layer.{i}.w": torch.full((400,), fill) for i in range(2)} for fill in (0.0, 1.0))
    first = rm.merge(specimens.random_choice(rm.model(zeros), rm.model(ones), seed=1))
    second = rm.merge(specimens.random_choice(rm.model(zeros), rm.model(ones), seed=2))
    assert not torch.equal(first["layer.0.w"], first["layer.1.w"])
    assert not torch.equal(first["layer.0.w"], second["layer.0.w"])
    assert 120 < first["layer.0.w"].sum() < 280


def test_a_method_that_breaks_its_declaration_is_told(specimens: ModuleType) -> None:
    from remelt.recipe.method import Same, merge_method

    module = ModuleType("breaks_its_word")

    def halves(a: Same) -> Same:
        return a[::2]

    def grows(a: Same) -> Same:
        return torch.cat([a, a])

    for function, cut in ((halves, "element"), (grows, "tensor")):
        function.__module__ = module.__name__
        function.__annotations__ = {"a": Same, "return": Same}
        setattr(module, function.__name__, merge_method(cut=cut)(function))  # type: ignore[call-overload]
    METHODS.add_module(module)
    given = rm.model({"w": torch.ones(8)})
    with pytest.raises(rm.MethodError, match=r"halves is declared to work by element, but made .* of 8 of w"):
        rm.merge(METHODS["halves"](given))
    with pytest.raises(rm.MethodError, match=r"grows made \[16\] of w, but \[8\] was planned"):
        rm.merge(METHODS["grows"](given))


def test_progress_counts_the_bytes_of_the_results() -> None:
    seen: list[tuple[int, int]] = []
    result = rm.merge(
        rm.weighted_sum(rm.model(model(1)), rm.model(model(2))),
        watch=lambda progress: seen.append((progress.done, progress.total)),
    )
    total = sum(value.nbytes for value in result.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_plan_pickles_and_reads_in_file_order(tmp_path: Path, write_model: Any) -> None:
    import pickle

    for seed in (1, 2):
        write_model(tmp_path / str(seed), model(seed))
    options = rm.MergeOptions()
    source = merging.load_recipe(rm.slerp(tmp_path / "1", tmp_path / "2", alpha=0.3))
    with merging.prepare_merges([source], [None], options) as prepared:
        group = prepared.groups[0]
        assert pickle.loads(pickle.dumps(group.plan)).bytes_read == group.plan.bytes_read
        checkpoint = group.inputs[0].checkpoint
        offsets = [checkpoint.position(planned.task.key) for planned in group.plan.tasks]
        assert offsets == sorted(offsets)


def test_torch_keeps_its_number_of_threads(specimens: ModuleType) -> None:
    before = torch.get_num_threads()
    rm.merge(rm.model(model(1)), threads=2)
    assert torch.get_num_threads() == before


def test_stopping_early_stops_the_threads(tmp_path: Path, write_model: Any) -> None:
    import threading

    for seed in (1, 2):
        write_model(tmp_path / str(seed), model(seed, 3_000_000))
    options = rm.MergeOptions(threads=2)
    source = merging.load_recipe(rm.weighted_sum(tmp_path / "1", tmp_path / "2", alpha=0.3))
    before = threading.active_count()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with merging.prepare_merges([source], [tmp_path / "out.safetensors"], options) as prepared:
        running = merging.run_prepared(prepared, options)
        next(running)
        running.close()
    assert threading.active_count() == before
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.safetensors", "2.safetensors"]


def test_interrupts_wait_for_the_threads() -> None:
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    joined: list[None] = []

    class Interrupted(threading.Thread):
        ident = 1

        def is_alive(self) -> bool:
            return thread.is_alive()

        def join(self, timeout: float | None = None) -> None:
            joined.append(None)
            if len(joined) > 2:
                ended.set()
                thread.join()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine_run._join([Interrupted()])
    assert not thread.is_alive()
    assert len(joined) == 3


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_histograms_of_many_slices_take_no_more_than_the_plan_says(
    executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if executor == "native" and not native.available():
        pytest.skip("the native executor is not built")
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    held: list[int] = []
    add = Fold.add

    def watched(fold: Fold, start: int, stop: int, found: Any) -> None:
        add(fold, start, stop, found)
        held.append(sum(value.nbytes for counts in fold._counts.values() for value in counts.values()))
        assert not any(values for _, part in fold._parts.values() for values in part.values())

    monkeypatch.setattr(Fold, "add", watched)
    a, b, c = ({"w": torch.randn(2**24, generator=torch.Generator().manual_seed(seed)).half()} for seed in range(3))
    base = rm.model(a)
    rm.merge(base + rm.ties_sum(rm.model(b) - base, rm.model(c) - base, k=0.3), threads=3)
    assert len(held) == 1 + 4 + 4
    assert 2 * 8 * 2**18 <= max(held) <= 2 * cost._COPIES * HELD


def test_a_result_in_memory_leaves_the_rest_of_the_budget_to_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    begin = Queue.__init__
    monkeypatch.setattr(
        Queue, "__init__", lambda queue, units, budget: (given.append(budget), begin(queue, units, budget))[1]
    )
    model = {f"w{place}": torch.randn(2**20) for place in range(8)}
    rm.merge(rm.weighted_sum(rm.model(model), rm.model(model)), memory="40MiB", threads=8)
    assert given == [8 * 2**20]


LONG = [("native", torch.float16, 150), ("native", torch.float8_e4m3fn, 70)]
MORE = [
    (executor, dtype, calls)
    for executor in ("native", "torch")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn)
    for calls in (70, 150)
    if (executor, dtype, calls) not in LONG
]


@pytest.mark.parametrize(
    ("executor", "dtype", "calls"), [*LONG, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE)], ids=str
)
def test_long_recipes_over_long_tensors(
    executor: str, dtype: torch.dtype, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if executor == "native" and not native.available():
        pytest.skip("the native executor is not built")
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    size = 2**22 + 2**20 + 3
    drawn = torch.Generator().manual_seed(0)
    tensors = [torch.rand(size, generator=drawn).to(dtype) for _ in range(3)]
    a, b, c = (rm.model({"w": tensor}) for tensor in tensors)
    recipe, due = a, tensors[0].double()
    for call in range(calls):
        other, alpha = call % 2 + 1, 0.1 + call / 1000
        recipe = rm.weighted_sum(recipe, (b, c)[other - 1], alpha=alpha)
        due = torch.lerp(due, tensors[other].double(), alpha)
    found = rm.merge(recipe, threads=2)["w"]
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), due, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_progress_of_a_finished_shared_task_counts_it_once(write_model: Any, tmp_path: Path) -> None:
    size = 3 * 2**22
    a, b = (rm.model({"w": torch.zeros(size, dtype=torch.float16)}) for _ in range(2))

    class Done:
        checked = False

        def done(self, *_: object) -> bool:
            return True

    with merging.prepare_merges(
        [merging.load_recipe(rm.slerp(a, b, alpha=0.3))], [None], rm.MergeOptions()
    ) as prepared:
        (group,) = prepared.groups
        checkpoints = {index: given.checkpoint for index, given in group.inputs.items()}
        execution = Execution(checkpoints, dict.fromkeys(checkpoints, "x"), [Done()])  # type: ignore[list-item]
        running = _Run(group.plan, execution, FiniteReport())
    assert running.units.take() is None
    assert running.kept == running.total == 2 * size
