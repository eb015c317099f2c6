"""Where extensions are found: our folder, entry points of installed packages, plugin files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest

from remelt.core.registry import Registry
from remelt.errors import OptionError, RecipeError


def things_of(module: ModuleType) -> Mapping[str, object]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Thing)}


class Thing:
    """An extension, for tests; the modules under test take it from ``sys.modules``."""


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Registry[object]]]:
    """A package of two modules on the path, and registries over it."""
    before = set(sys.modules)
    holder = ModuleType("things_for_tests")
    holder.Thing = Thing  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "things_for_tests", holder)
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "own_things"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "first.py").write_text("from things_for_tests import Thing\nalpha = Thing()\n")
    (package / "second.py").write_text(
        "from own_things.first import alpha\nfrom things_for_tests import Thing\nbeta = Thing()\n"
    )
    yield lambda: Registry("thing", package="own_things", group="tests.things", collect=things_of)
    for name in set(sys.modules) - before:
        del sys.modules[name]


Make = Callable[[], Registry[object]]


def write(path: Path, *names: str) -> Path:
    lines = ["from things_for_tests import Thing", *(f"{name} = Thing()" for name in names)]
    path.write_text("\n".join(lines) + "\n")
    return path


def install(folder: Path, distribution: str, entry: str) -> None:
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[tests.things]\n{entry}\n")


def test_our_folder_is_read_at_the_first_use(registry: Make) -> None:
    found = registry()
    assert "own_things" not in sys.modules
    assert list(found) == ["alpha", "beta"]
    assert len(found) == 2
    assert found["alpha"] is found.find("alpha")
    assert "gamma" not in found
    assert found.get("gamma") is None


def test_an_unknown_name_is_refused_with_the_nearest(registry: Make) -> None:
    with pytest.raises(RecipeError, match=r"no thing is named 'alhpa'\nhint: did you mean 'alpha'\?"):
        registry().find("alhpa")
    with pytest.raises(KeyError):
        registry()["alhpa"]


def test_entry_points_of_installed_packages_are_found(registry: Make, tmp_path: Path) -> None:
    write(tmp_path / "theirs.py", "gamma")
    install(tmp_path, "theirs", "whatever = theirs")
    assert list(registry()) == ["alpha", "beta", "gamma"]


def test_a_broken_entry_point_names_its_package_every_time(registry: Make, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n")
    install(tmp_path, "bad-things", "whatever = broken")
    found = registry()
    for _ in range(2):
        with pytest.raises(
            OptionError,
            match=r"broken, which bad-things offers as tests.things, cannot be loaded: ModuleNotFoundError: No module"
            r".*\nhint: update or uninstall that package",
        ):
            found.find("alpha")


def test_a_plugin_file_adds_its_own(registry: Make, tmp_path: Path) -> None:
    found = registry()
    found.add_file(write(tmp_path / "mine.py", "gamma"))
    assert list(found) == ["alpha", "beta", "gamma"]


def test_a_plugin_file_may_be_given_twice(registry: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = registry()
    found.add_file(write(tmp_path / "mine.py", "gamma"))
    first = found["gamma"]
    monkeypatch.chdir(tmp_path)
    found.add_file(Path("mine.py"))
    assert found["gamma"] is first


def test_plugins_of_one_file_name_are_two_modules(registry: Make, tmp_path: Path) -> None:
    found, before = registry(), set(sys.modules)
    for folder, name in (("x", "gamma"), ("y", "delta")):
        (tmp_path / folder).mkdir()
        found.add_file(write(tmp_path / folder / "mine.py", name))
    assert list(found) == ["alpha", "beta", "delta", "gamma"]
    assert len([name for name in set(sys.modules) - before if name.startswith("remelt_plugin_mine")]) == 2


def test_two_of_one_name_are_refused(registry: Make, tmp_path: Path) -> None:
    found = registry()
    with pytest.raises(
        OptionError,
        match=r"two things are named 'alpha': one in own_things.first, one in remelt_plugin_mine_\w+\nhint: rename",
    ):
        found.add_file(write(tmp_path / "mine.py", "aardvark", "alpha"))
    assert list(found) == ["alpha", "beta"]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: "),
        ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_broken_plugin_is_told(registry: Make, tmp_path: Path, content: str, error: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(content)
    found, before = registry(), set(sys.modules)
    with pytest.raises(OptionError, match=rf"plugin .*mine.py cannot be loaded: {error}"):
        found.add_file(path)
    assert not [name for name in set(sys.modules) - before if name.startswith("remelt_plugin_mine")]
    write(path, "gamma")
    found.add_file(path)
    assert "gamma" in found


def test_what_is_no_plugin_is_refused(registry: Make, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"is not a file\nhint: --plugin takes the path of a Python file"):
        registry().add_file(tmp_path / "nowhere.py")
    (tmp_path / "mine.txt").write_text("x = 1")
    with pytest.raises(OptionError, match=r"is not a Python file\nhint: its name must end in .py"):
        registry().add_file(tmp_path / "mine.txt")
