"""Small models that run: they are of their archs, and run with the tensors of a file."""

from __future__ import annotations

import pytest
import torch
from spoiled import model

from remelt.alignment.instances.instance import infos_of
from remelt.archs.detect import detect

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

ARCHS = ["clip_l", "sd1", "sd2", "sdxl", "sdxl_refiner", "vae"]


@pytest.mark.parametrize("arch", ARCHS)
def test_an_instance_runs_with_the_tensors_of_a_file_as_it_does_by_itself(arch: str) -> None:
    instance, _ = model(arch)
    state = instance.module.state_dict()
    assert {name for name, tensor in state.items() if tensor.is_floating_point()} == instance.parameters.keys()
    assert {key: tuple(state[key].shape) for key in instance.parameters} == {
        name: made.info.shape for name, made in instance.parameters.items()
    }
    assert {piece.key for made in instance.parameters.values() for piece in made.pieces} == instance.tensors.keys()
    zeros = {key: torch.zeros_like(tensor) for key, tensor in instance.tensors.items()}
    outputs = instance.function(instance.tensors)
    assert all(tensor.dtype == torch.float64 and tensor.isfinite().all() and tensor.std() > 0.01 for tensor in outputs)
    assert not any(torch.equal(one, other) for one, other in zip(outputs, instance.function(zeros), strict=True))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_file_with_the_tensors_of_an_instance_is_recognised(arch: str) -> None:
    instance, _ = model(arch)
    found = detect(infos_of(instance.tensors)).arch
    assert found is not None and found.name == instance.arch == arch
