"""What scripts for sd-mecha may say, and what of it is refused rather than passed over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import remelt as rm
import remelt.compat.sd_mecha as sd_mecha
from remelt.compat.sd_mecha import Parameter, Return
from remelt.compat.sd_mecha.methods import is_delta
from remelt.errors import OptionError, RecipeError, RefusedError
from remelt.methods import METHODS
from remelt.recipe.node import Call

A, B, C = (rm.model(name) for name in "abc")


def test_operands_by_name_stand_in_the_order_of_the_signature() -> None:
    assert sd_mecha.subtract(b=B, a=A).digest() == (A - B).digest()
    assert sd_mecha.weighted_sum(alpha=0.25, b=B, a=A).digest() == rm.weighted_sum(A, B, alpha=0.25).digest()
    assert sd_mecha.weighted_sum(A, b=B, alpha=0.25).digest() == rm.weighted_sum(A, B, alpha=0.25).digest()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: sd_mecha.weighted_sum("x", "y", a="z"), "'a' is given twice"),
        (lambda: sd_mecha.weighted_sum("x", alpha=0.5), "b is missing"),
        (lambda: sd_mecha.add_difference(A, B, C, alhpa=0.5), "has no argument 'alhpa'\nhint: did you mean 'alpha'"),
        (lambda: sd_mecha.add_perpendicular(A, B, C, alhpa=0.5), "add_perpendicular has no argument 'alhpa'"),
        (lambda: sd_mecha.add_difference_ties(A, B, K=0.5), "add_difference_ties has no argument 'K'"),
        (lambda: sd_mecha.add_ties_with_dare(A, B, probabilty=0.5), "did you mean 'probability'"),
        (lambda: sd_mecha.rotate(A, B, alignement=0.5), "did you mean 'alignment'"),
        (lambda: sd_mecha.rotate(A, B, alignment=0.5, beta=0.5), "not all of them"),
        (lambda: sd_mecha.copy_region(A, B, widht=0.5), "did you mean 'width'"),
        (lambda: sd_mecha.rebasin(A), "rebasin needs 2 models, but ref is missing"),
        (lambda: sd_mecha.rebasin(A, B, iter=5), "rebasin has no argument 'iter'\nhint: did you mean 'iters'"),
        (lambda: sd_mecha.randperm(A), "randperm of sd-mecha is not in remelt yet"),
        (lambda: sd_mecha.omit_non_finite(A), "omit_non_finite of sd-mecha is not in remelt yet"),
        (lambda: sd_mecha.merge_method(reuse_output=False), "did you mean 'reuse_outputs'"),
        (lambda: sd_mecha.model("a", "sd1-kohya"), "the model config 'sd1-kohya' is not read"),
        (lambda: sd_mecha.convert(A, "sd1-kohya"), "the model config 'sd1-kohya' is not read"),
        (lambda: sd_mecha.convert({"BASE": 0.5}, "sd1-ldm") | "x", "unsupported"),
        (lambda: sd_mecha.convert({"BASE": 0.5, "IN3": 1}, "sd1-ldm") | 1, "did you mean 'IN03'"),
        (lambda: sd_mecha.convert({"BASE": 0.5, "IN00": 1}, A) | 1, "the model's arch is not known"),
        (lambda: sd_mecha.weighted_sum(A, B, alpha=sd_mecha.convert({"IN00": 1}, "sd1-ldm")), "say nothing of BASE"),
    ],
)  # fmt: skip
def test_what_is_not_taken_is_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises((RecipeError, TypeError), match=message):
        wrong()


def test_rebasin_aligns_the_first_model_to_the_second() -> None:
    for made in (sd_mecha.rebasin(A, B), sd_mecha.rebasin(A, B, 20), sd_mecha.rebasin(ref=B, a=A, iters=1)):
        assert made.digest() == rm.rebasin(A, to=B).digest()


def test_what_rebasin_does_otherwise_on_purpose() -> None:
    """What the documentation says of sd-mecha's: where this fails, it has changed there."""
    sdxl = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.rebasin.sdxl_sgm")
    closures = sdxl.perm_graph.closures()
    keys = {key for closure in closures for key in closure.keys}
    assert not any(key.startswith("first_stage_model.") for key in keys)
    assert not any(".in_layers." in key or ".proj_in." in key for key in keys)
    attention = [
        (closure.pid_to_width[number], node.offset)
        for closure in closures
        for number, nodes in closure.pid_to_nodes.items()
        for node in nodes
        if node.key.endswith("attn1.to_v.weight")
    ]
    assert {width for width, _ in attention} == {10, 20}  # of heads that have 64 channels
    assert any(offset // 64 != (offset + width - 1) // 64 for width, offset in attention)


def test_arguments_of_the_first_versions_are_taken() -> None:
    old = sd_mecha.rotate(A, B, alpha=0.75, beta=0.25, device="cuda", cache={})
    assert old.digest() == sd_mecha.rotate(A, B, alignment=0.75, alpha=0.25).digest()
    assert sd_mecha.crossover(A, B, mean=0.25).digest() == sd_mecha.crossover(A, B, 0.25).digest()
    assert (
        sd_mecha.weighted_sum(A, B, alpha=0.5, dtype=torch.float64).digest()
        == rm.weighted_sum(A, B, alpha=0.5).digest()
    )


def test_numbers_by_block_become_weights_of_the_models_arch() -> None:
    told = rm.model("a", arch="sdxl")
    by_hand = sd_mecha.convert(sd_mecha.literal({"BASE": 0.25, "VAE": 0.25}, "sdxl-supermerger_blocks"), told) | 0.25
    assert by_hand == rm.blocks(BASE=0.25) | 0.25
    assert sd_mecha.convert(sd_mecha.literal({"BASE": 0.3}), rm.model("a", arch="sd1")) | 1.0 == (
        rm.keys({"model.diffusion_model.time_embed.*": 0.3, "model_ema.*": 0.3}, optional=True)
        | rm.blocks(BASE=0.3)
        | 1.0
    )


def test_all_configs_of_sd_mecha_are_named() -> None:
    configs = sd_mecha.extensions.model_configs
    assert len(configs.get_all()) == 17
    assert configs.resolve("sd1-supermerger_blocks").arch is None
    with pytest.raises(RecipeError, match="the model config 'sd1-kohya' is not read"):
        configs.resolve("sd1-kohya").components()
    theirs = pytest.importorskip("sd_mecha").extensions.model_configs.get_all()
    assert sorted(one.identifier for one in theirs) == [one.identifier for one in configs.get_all()]


def test_what_is_a_difference_is_told_by_what_methods_declare() -> None:
    deltas = [
        A - B,
        0.5 * (A - B),
        (A - B) - (A - C),
        rm.model("d", space="delta"),
        rm.perpendicular_component(A - B, A - C),
    ]
    if "dare" in METHODS:
        deltas.append(Call("dare", (A - B,)))
    assert all(is_delta(one) for one in deltas)
    assert not any(is_delta(one) for one in (A, A + (B - C), A - (B - C), A | B, rm.cast(A, "fp16")))


@sd_mecha.merge_method(register=False)
def shifted(
    a: Parameter(Tensor, "weight"),  # type: ignore[valid-type]
    alpha: Parameter(float) = 0.5,  # type: ignore[valid-type]
    b: Parameter(Tensor, "param") = 1.0,  # type: ignore[valid-type]
) -> Return(Tensor, "weight"):  # type: ignore[valid-type]
    """A model, moved."""
    return a + alpha * b


def test_numbers_of_ones_own_method_may_go_by_position() -> None:
    assert shifted(A, 0.25).digest() == shifted(A, alpha=0.25).digest()
    assert shifted.__wrapped__(torch.ones(2), 2.0, 3.0).tolist() == [7.0, 7.0]
    with pytest.raises(RecipeError, match="has no argument 'beta'"):
        shifted(A, beta=1)


def test_what_a_merge_is_asked_for_is_done_or_refused(tmp_path: Path) -> None:
    a = {"w": torch.tensor([1.0, float("nan")])}
    b = {"w": torch.tensor([3.0, 5.0]), "x": torch.ones(1)}
    recipe = rm.weighted_sum(rm.model(a), rm.model(b), alpha=0.5)
    with pytest.raises(Exception, match=r"(?i)nan|finite"):
        sd_mecha.merge(recipe)
    assert sd_mecha.merge(recipe, check_finite_output=False)["w"].isnan().any()
    assert sd_mecha.merge(recipe, omit_non_finite_inputs=True)["w"].tolist() == [3.0, 5.0]
    clean = rm.weighted_sum(rm.model({"w": torch.zeros(2)}), rm.model(b), alpha=0.5)
    with pytest.raises(RefusedError, match="lacks"):
        sd_mecha.merge(clean, strict_mandatory_keys=True)
    with pytest.raises(OptionError, match="the recipe's result is a weight, but strict_merge_space is 'delta'"):
        sd_mecha.merge(clean, strict_merge_space="delta")
    with pytest.raises(OptionError, match="allow_empty_merge"):
        sd_mecha.merge(clean, allow_empty_merge=True)
    with pytest.raises(OptionError, match="did you mean 'output_dtype'"):
        sd_mecha.merge(clean, output_dtyp=torch.float32)
    with pytest.raises(OptionError, match="RecipeMerger has no argument 'model_dir'"):
        sd_mecha.RecipeMerger(model_dir=tmp_path)
    with pytest.raises(OptionError, match="did you mean 'save_dtype'"):
        sd_mecha.RecipeMerger().merge_and_save(clean, output={}, save_dtyp=torch.float32)
