"""The declarative files: what they say, how others are added, and how a bad one is refused."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from remelt.archs import arch as arch_module
from remelt.archs.arch import Dim, add_arch_file, all_archs, find_arch, read_arch
from remelt.archs.facts import layout
from remelt.archs.named import ARCH_FILES
from remelt.errors import OptionError, RecipeError

GOOD = """
name = "toy"
title = "A toy"
copied = ["*.table"]

[[recognise]]
keys = {"toy.in.weight" = ["~8|16", "1..3", "4..", "*", 5]}

[[component]]
name = "body"
prefixes = ["toy."]

[[block]]
name = "T{i:02d}"
paths = ["toy.blocks.{i}."]
"""


@pytest.fixture
def fresh_registry() -> Iterator[None]:
    arch_module._registry.cache_clear()
    yield
    arch_module._registry.cache_clear()


def written(folder: Path, text: str) -> Path:
    path = folder / "toy.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_named_archs_are_there() -> None:
    assert sorted(all_archs()) == sorted(Path(path).stem for path in ARCH_FILES)
    assert len(all_archs()) >= 39
    assert {arch.name for arch in all_archs().values()} == set(all_archs())


@pytest.mark.parametrize("path", ARCH_FILES, ids=lambda path: path.stem)
def test_a_file_is_named_after_its_arch_and_holds_no_table(path: Path) -> None:
    assert read_arch(path).name == path.stem
    assert len(path.read_bytes()) < 5000


def test_an_unknown_arch_gets_the_nearest_names() -> None:
    with pytest.raises(RecipeError, match="no arch is named 'sdlx'") as caught:
        find_arch("sdlx")
    assert caught.value.hint == "did you mean 'sdxl'?"


@pytest.mark.usefixtures("fresh_registry")
def test_a_file_can_be_added(tmp_path: Path) -> None:
    added = add_arch_file(written(tmp_path, GOOD))
    assert all_archs()["toy"] is find_arch("toy") is added
    assert layout(["toy.blocks.3.w", "toy.a.table"], added).facts("toy.blocks.3.w").blocks == ("T03",)
    assert layout(["toy.a.table"], added).facts("toy.a.table").copied


@pytest.mark.usefixtures("fresh_registry")
def test_an_installed_package_can_offer_archs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, GOOD)
    (tmp_path / "toy_archs.py").write_text(f"ARCH_FILES = [{str(path)!r}]", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("toy", "toy_archs", "remelt.archs")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point] if group == "remelt.archs" else [])
    assert find_arch("toy").title == "A toy"
    assert "sd1" in all_archs()


@pytest.mark.usefixtures("fresh_registry")
def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="two archs are named 'sd1'"):
        add_arch_file(written(tmp_path, GOOD.replace('"toy"', '"sd1"')))


@pytest.mark.parametrize(
    ("value", "text", "fitting", "others"),
    [
        (Dim(4, 4), "4", [4], [3, 5]),
        (Dim(0, None), "*", [0, 7], []),
        (Dim(4, 9), "4..9", [4, 9], [3, 10]),
        (Dim(4, None), "4..", [4, 400], [3]),
        (Dim(1, None, (320, 384)), "320|384", [320, 384], [321, 20]),
    ],
)
def test_what_a_dimension_may_be(value: Dim, text: str, fitting: list[int], others: list[int]) -> None:
    assert str(value) == text
    assert all(value.fits(size, scaled=False) for size in fitting)
    assert not any(value.fits(size, scaled=False) for size in others)


def test_a_size_of_a_full_model_is_not_asked_of_a_scaled_one() -> None:
    assert Dim(1, None, (320,)).fits(20, scaled=True)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('name = "toy"', "name = 3", "toy.toml: 'name' must be a text, but is 3"),
        ('title = "A toy"', "", "toy.toml: it lacks 'title'"),
        ('copied = ["*.table"]', 'copied = "x"', "toy.toml: 'copied' must be a list of texts, but is 'x'"),
        ("[[recognise]]", "[[recognize]]", "toy.toml: unknown entry 'recognize'"),
        ('"1..3"', '"1-3"', "toy.toml: [[recognise]] 1: '1-3' is no dimension"),
        ('["~8|16", "1..3", "4..", "*", 5]', "4", "[[recognise]] 1: the shape of 'toy.in.weight' must be a list"),
        ('["toy."]', "[]", "toy.toml: [[component]] 1: a component needs at least one prefix"),
        ('"T{i:02d}"', '"T{n}"', "toy.toml: [[block]] 1: 'T{n}' or one of its aliases is no template of {i}"),
        ('"T{i:02d}"', '"T{i"', "toy.toml: [[block]] 1: 'T{i' or one of its aliases is no template of {i}"),
        ('"T{i:02d}"', '"T{i.real.x}"', "toy.toml: [[block]] 1: 'T{i.real.x}' or one of its aliases is no template"),
        ("blocks.{i}.", "{i}.{i}.", "toy.toml: [[block]] 1: a block needs paths with at most one {i} each"),
        ('name = "T', 'nam = "T', "toy.toml: [[block]] 1: it lacks 'name'"),
        ("paths =", "path =", "toy.toml: [[block]] 1: a block needs paths"),
        ("[[block]]", "[block]", "toy.toml: 'block' must be written as [[block]] tables"),
        ("[[component]]", "[[component", "is not a TOML file"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_by_entry(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in GOOD
    path = written(tmp_path, GOOD.replace(before, after))
    with pytest.raises(OptionError) as caught:
        read_arch(path)
    assert message in caught.value.message


def test_a_key_may_be_in_several_groups(tmp_path: Path) -> None:
    groups = """
[[group]]
name = "REST"
outside = ["T*"]

[[group]]
name = "LATE"
aliases = ["late"]
outside = ["T00"]
"""
    found = layout(["toy.blocks.0.w", "toy.blocks.1.w", "toy.in"], read_arch(written(tmp_path, GOOD + groups)))
    assert found.groups == {"LATE": ("toy.blocks.1.w", "toy.in"), "REST": ("toy.in",)}
    assert found.facts("toy.in").groups == ("REST", "LATE", "late")


def test_a_file_without_signs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"it needs at least one \[\[recognise\]\] table"):
        read_arch(written(tmp_path, 'name = "x"\ntitle = "y"'))


def test_the_example_of_the_documentation_is_a_good_file(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "archs.md").read_text(encoding="utf-8")
    example = page.partition("```toml\n")[2].partition("```")[0]
    arch = read_arch(written(tmp_path, example))
    found = layout(["blocks.3.attn.w", "conv_in.weight"], arch)
    assert found.facts("blocks.3.attn.w").blocks == ("T03", "t3")
    assert found.facts("conv_in.weight").groups == ("BASE",)
    assert found.preset_names(13)[-1] == "T11"
    assert layout(["old_toy.blocks.3.attn.w"], arch).facts("old_toy.blocks.3.attn.w").blocks == ("T03", "t3")
    assert [dialect.folder or dialect.prefix for dialect in arch.components[0].dialects] == ["transformer", "unet."]


@pytest.mark.parametrize(
    "entries", ['usual = "a."\nfound = "b."', 'of = ["x."]', 'usual = "a."\nfound = "a."\nof = ["x."]']
)
def test_another_start_that_says_nothing_is_refused(tmp_path: Path, entries: str) -> None:
    with pytest.raises(OptionError) as caught:
        read_arch(written(tmp_path, f"{GOOD}\n[[other_start]]\n{entries}"))
    assert caught.value.message == (
        "toy.toml: [[other_start]] 1: another start needs the parts that it is of, and another one than the usual"
    )


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is not a file"):
        add_arch_file(tmp_path / "none.toml")
    with pytest.raises(OptionError, match="cannot be read"):
        read_arch(tmp_path)
    binary = tmp_path / "toy.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match="is not a TOML file"):
        read_arch(binary)
