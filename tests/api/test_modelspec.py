"""What sites and user interfaces read of a merged file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import remelt as rm
from remelt.archs.shapes import sd1_shapes, sdxl_shapes
from remelt.cli.main import run
from remelt.core.tensor_info import TensorInfo
from remelt.errors import OptionError

TOLD = {
    "modelspec.title": "Ghost, mixed",
    "modelspec.architecture": "stable-diffusion-v1",
    "modelspec.license": "CreativeML Open RAIL-M",
    "modelspec.prediction_type": "epsilon",
    "modelspec.hash_sha256": "0x12",
    "modelspec.thumbnail": "data:image/jpeg;base64,",
    "ss_network_dim": "8",
}


def spec(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        told = file.metadata()
    return {key.removeprefix("modelspec."): text for key, text in told.items() if key.startswith("modelspec.")}


@pytest.fixture
def write(tmp_path: Path, write_model: Callable[..., Path]) -> Callable[..., Path]:
    def made(name: str, shapes: dict[str, TensorInfo], metadata: dict[str, str] | None = None) -> Path:
        return write_model(tmp_path / name, {key: torch.ones(info.shape) for key, info in shapes.items()}, metadata)

    return made


def test_it_is_carried_over_and_written(write: Callable[..., Path], tmp_path: Path) -> None:
    shapes = sd1_shapes(32)
    a, b = write("a", shapes, TOLD), write("plain_b", shapes, {"modelspec.license": "other"})
    found = spec(rm.merge(rm.weighted_sum(a, b), tmp_path / "out.safetensors"))
    assert found == {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-v1",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "resolution": "512x512",
        "prediction_type": "epsilon",
        "title": "Ghost, mixed + plain_b",
        "license": "CreativeML Open RAIL-M, other",
        "merged_from": '"Ghost, mixed", plain_b',
    }


def test_a_title_may_be_given_and_is_kept(write: Callable[..., Path], tmp_path: Path) -> None:
    a, b = (write(name, sd1_shapes(32)) for name in "ab")
    out = rm.merge(rm.weighted_sum(a, b), tmp_path / "out.safetensors", title="Mixed of two")
    assert spec(out)["title"] == "Mixed of two"
    again = rm.merge(out, tmp_path / "again.safetensors")
    assert again.read_bytes() == out.read_bytes()


def test_many_models_have_a_short_title(write: Callable[..., Path], tmp_path: Path) -> None:
    found = spec(
        rm.merge(rm.n_average(*[write(name, sd1_shapes(32)) for name in "abcde"]), tmp_path / "out.safetensors")
    )
    assert found["title"] == "a + b + c and 2 more"
    assert found["merged_from"] == "a, b, c, d, e"


def test_a_marker_tells_the_prediction(write: Callable[..., Path], tmp_path: Path) -> None:
    shapes = sdxl_shapes(64)
    marked = {**shapes, "v_pred": next(iter(sdxl_shapes(64).values()))}
    found = spec(rm.merge(rm.model(write("a", marked)), tmp_path / "out.safetensors"))
    assert (found["architecture"], found["prediction_type"]) == ("stable-diffusion-xl-v1-base", "v")
    assert "merged_from" not in found
    assert "prediction_type" not in spec(rm.merge(rm.model(write("b", shapes)), tmp_path / "other.safetensors"))


def test_what_is_of_no_known_arch_is_told_nothing_of(write_model: Callable[..., Path], tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", {"x.weight": torch.ones(3)})
    assert spec(rm.merge(rm.model(a), tmp_path / "out.safetensors")) == {}


PEOPLE = {
    "author": "Ada",
    "description": "Ghosts.",
    "tags": "ghosts, night",
    "usage_hint": "say boo",
    "date": "2024-05-01",
    "merged_from": '"x, y", z',
    "category": "Style",
    "trigger_phrase": "ghostly",
    "implementation_version": "2",
    "implementation": "sgm",
}
SPEC = {f"modelspec.{name}": text for name, text in PEOPLE.items()}


def test_what_people_wrote_of_one_model_stays_where_it_is_pruned(write: Callable[..., Path], tmp_path: Path) -> None:
    made = rm.merge(rm.model(write("a", sd1_shapes(32), TOLD | SPEC)), tmp_path / "out.safetensors", dtype="fp16")
    found = spec(made)
    assert {name: found.get(name) for name in PEOPLE} == PEOPLE
    assert found["title"] == "Ghost, mixed"
    assert found.keys() & {"thumbnail", "hash_sha256"} == set()


def test_a_merge_is_by_all_authors_and_of_no_ones_date(write: Callable[..., Path], tmp_path: Path) -> None:
    a = write("a", sd1_shapes(32), {"modelspec.tags": "ghosts,  grey", "modelspec.title": 'The "best"'})
    b = write("b", sd1_shapes(32), SPEC)
    c = write("c", sd1_shapes(32), {"modelspec.author": "Grace", "modelspec.description": "Another."})
    found = spec(rm.merge(rm.n_average(a, b, c), tmp_path / "out.safetensors"))
    told = {name: found.get(name) for name in (*PEOPLE, "title")}
    assert told == {
        "author": "Ada, Grace",
        "description": "Ghosts.",
        "tags": "ghosts, grey, night",
        "usage_hint": "say boo",
        "date": None,
        "merged_from": '"The ""best""", b, c',
        "category": "Style",
        "trigger_phrase": "ghostly",
        "implementation_version": None,
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": 'The "best" + b + c',
    }


def test_entries_may_be_given_and_left_out_and_are_kept(write: Callable[..., Path], tmp_path: Path) -> None:
    a, b = write("a", sd1_shapes(32), SPEC), write("b", sd1_shapes(32))
    asked = {"author": "Lin", "description": "", "tags": "new"}
    out = rm.merge(rm.weighted_sum(a, b), tmp_path / "out.safetensors", modelspec=asked, ignore_unused=True)
    found = spec(out)
    assert (found["author"], found["tags"]) == ("Lin", "new")
    assert "description" not in found
    assert rm.merge(out, tmp_path / "again.safetensors").read_bytes() == out.read_bytes()
    command = ["merge", str(a), str(b), "-m", "weighted_sum", "-q", "--ignore-unused", "-o", str(tmp_path / "c")]
    for name, text in asked.items():
        command += ["--modelspec", name, text]
    assert run(command) == 0
    assert spec(tmp_path / "c.safetensors") == found


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"autor": "x"}, "the ModelSpec standard has no entry 'autor'.*did you mean 'author'"),
        ({"title": "x"}, "the ModelSpec entry 'title' is written anew for every result.*title names the result"),
        ({"merged_from": "x"}, "the ModelSpec entry 'merged_from' is written anew for every result"),
        ({"tags": ["x"]}, r"the ModelSpec entry 'tags' is a text, but got \['x'\]"),
    ],
)
def test_other_entries_are_refused(asked: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        rm.plan(rm.model("nothing"), modelspec=asked)
    assert re.search(message, f"{caught.value.message} {caught.value.hint}")


def test_folders_keep_it_there_and_back(write: Callable[..., Path], tmp_path: Path) -> None:
    a = write("a", sdxl_shapes(64), SPEC | {"modelspec.title": "Ghosts, all", "modelspec.resolution": "768x768"})
    there = rm.convert(a, tmp_path / "there", to="diffusers")
    for file in sorted(there.glob("*/*.safetensors")):
        told = spec(file)
        assert (told["title"], told["author"], told["implementation"]) == ("Ghosts, all", "Ada", "diffusers")
    assert len(list(there.glob("*/*.safetensors"))) == 4
    back = spec(rm.convert(there, tmp_path / "back.safetensors", to="original"))
    before = spec(rm.merge(rm.model(a), tmp_path / "before.safetensors"))
    # A folder's files are of another code base, so that the original's is the arch's again.
    changed = {"implementation": "https://github.com/Stability-AI/generative-models"}
    assert back == {name: text for name, text in {**before, **changed}.items() if name != "implementation_version"}


def test_v_prediction_is_told_of_a_folder_and_of_a_file_made_of_it(write: Callable[..., Path], tmp_path: Path) -> None:
    shapes = sdxl_shapes(64)
    marked = {**shapes, "v_pred": next(iter(shapes.values()))}
    there = rm.convert(write("a", marked), tmp_path / "there", to="diffusers")
    assert spec(there / "unet" / "diffusion_pytorch_model.safetensors")["prediction_type"] == "v"
    assert spec(rm.convert(there, tmp_path / "back.safetensors", to="original"))["prediction_type"] == "v"


def test_a_difference_is_no_model(write: Callable[..., Path], tmp_path: Path) -> None:
    a, b = (rm.model(write(name, sd1_shapes(32))) for name in "ab")
    assert spec(rm.merge(a - b, tmp_path / "out.safetensors")) == {}


def test_the_hash_is_that_of_what_follows_the_header(tmp_path: Path) -> None:
    tensors = {key: torch.randn(info.shape) for key, info in sd1_shapes(32).items()}
    for number in (0, 1):
        save_file({key: tensor + number for key, tensor in tensors.items()}, tmp_path / f"{number}.safetensors")
    recipe = rm.weighted_sum(tmp_path / "0.safetensors", tmp_path / "1.safetensors")
    out = rm.merge(recipe, tmp_path / "out.safetensors", hashed=True)
    content = out.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    with safe_open(out, "pt") as file:
        told = file.metadata()
    assert told["modelspec.hash_sha256"] == f"0x{hashlib.sha256(content[start:]).hexdigest()}"
    assert rm.merge(recipe, tmp_path / "again.safetensors", hashed=True).read_bytes() == content
    with safe_open(rm.merge(recipe, tmp_path / "plain.safetensors"), "pt") as file:
        assert "modelspec.hash_sha256" not in file.metadata()
    from remelt.api.verification import verify

    assert verify(out).checksum
