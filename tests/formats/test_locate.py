"""Names of models: an explicit path, then beside the recipe, then the models folders."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from remelt.errors import ModelNameError, OptionError
from remelt.formats.locate import config_path, locate_model, models_folders


@pytest.fixture
def recipe_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe's folder; the working directory is another one, which is empty."""
    for name in ("recipes", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "recipes"


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def model_folder(path: Path) -> Path:
    touch(path / "config.json")
    touch(path / "model.safetensors")
    return path


def test_an_explicit_path_wins(recipe_folder: Path, tmp_path: Path) -> None:
    given = touch(tmp_path / "elsewhere" / "ghost.safetensors")
    touch(recipe_folder / "ghost.safetensors")
    assert locate_model("ghost.safetensors", [recipe_folder]).resolve() == given
    assert locate_model("ghost", [recipe_folder]).resolve() == given
    absolute = touch(tmp_path / "far" / "away.ckpt")
    assert locate_model(str(absolute), [recipe_folder]) == absolute
    assert locate_model(str(absolute.with_suffix("")), [recipe_folder]) == absolute


def test_the_home_folder_may_be_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    found = touch(tmp_path / "models" / "ghost.safetensors")
    assert locate_model("~/models/ghost", [tmp_path]) == found


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".pth", ".bin"])
def test_the_suffix_may_be_missing(recipe_folder: Path, tmp_path: Path, suffix: str) -> None:
    beside = touch(recipe_folder / f"near-v1.5{suffix}")
    deep = touch(tmp_path / "models" / "sd" / f"deep-v1.5{suffix}")
    folders = [recipe_folder, tmp_path / "models"]
    for name in ("near-v1.5", beside.name):
        assert locate_model(name, folders) == beside
    for name in ("deep-v1.5", deep.name, "sd/deep-v1.5", f"sd/{deep.name}"):
        assert locate_model(name, folders) == deep


def test_beside_the_recipe_goes_before_the_models_folders(recipe_folder: Path, tmp_path: Path) -> None:
    beside = touch(recipe_folder / "ghost.safetensors")
    touch(tmp_path / "models" / "ghost.safetensors")
    assert locate_model("ghost", [recipe_folder, tmp_path / "models"]) == beside


def test_the_recipes_folder_is_looked_in_by_relative_path_only(recipe_folder: Path) -> None:
    found = touch(recipe_folder / "inputs" / "ghost.safetensors")
    assert locate_model("inputs/ghost", [recipe_folder]) == found
    assert locate_model("inputs/GHOST", [recipe_folder]) == found
    with pytest.raises(ModelNameError, match="no model is named 'ghost'"):
        locate_model("ghost", [recipe_folder])


def test_case_is_ignored_only_where_no_name_fits_exactly(recipe_folder: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    exact = touch(models / "a" / "Ghost.safetensors")
    touch(models / "b" / "GHOST.safetensors")
    assert locate_model("Ghost", [recipe_folder, models]) == exact
    loud = touch(models / "LOUD.SAFETENSORS")
    assert locate_model("loud", [recipe_folder, models]) == loud
    with pytest.raises(ModelNameError, match="'ghost' may be any of 2 models"):
        locate_model("ghost", [recipe_folder, models])


def test_a_name_that_fits_two_files_is_refused_with_both(recipe_folder: Path, tmp_path: Path) -> None:
    first = touch(tmp_path / "models" / "sd" / "ghost.safetensors")
    second = touch(tmp_path / "more" / "ghost.ckpt")
    folders = [recipe_folder, tmp_path / "models", tmp_path / "more"]
    with pytest.raises(ModelNameError) as caught:
        locate_model("ghost", folders)
    assert caught.value.message == f"'ghost' may be any of 2 models:\n  {first}\n  {second}"
    assert caught.value.hint == "write more of the path, or the suffix"
    assert locate_model("ghost.ckpt", folders) == second
    assert locate_model("sd/ghost", folders) == first


def test_two_suffixes_beside_the_recipe_are_ambiguous_too(recipe_folder: Path) -> None:
    for suffix in (".safetensors", ".ckpt"):
        touch(recipe_folder / f"ghost{suffix}")
    with pytest.raises(ModelNameError, match="'ghost' may be any of 2 models"):
        locate_model("ghost", [recipe_folder])


def test_a_long_list_of_candidates_is_cut(recipe_folder: Path, tmp_path: Path) -> None:
    for number in range(30):
        touch(tmp_path / "models" / str(number) / "model.safetensors")
    with pytest.raises(ModelNameError, match=r"any of 30 models") as caught:
        locate_model("model", [recipe_folder, tmp_path / "models"])
    assert caught.value.message.endswith("\n  ... and 10 more")


def test_one_file_reached_twice_is_one_model(recipe_folder: Path, tmp_path: Path) -> None:
    found = touch(tmp_path / "models" / "sd" / "ghost.safetensors")
    (tmp_path / "models" / "ghost.safetensors").symlink_to(found)
    folders = [recipe_folder, tmp_path / "models", tmp_path / "models" / "sd"]
    assert locate_model("ghost", folders).resolve() == found


def test_a_model_folder_has_a_name_too(recipe_folder: Path, tmp_path: Path) -> None:
    llama = model_folder(tmp_path / "models" / "llm" / "llama-3")
    touch(tmp_path / "models" / "sdxl" / "model_index.json")
    for name in ("llama-3", "llm/llama-3", "LLAMA-3"):
        assert locate_model(name, [recipe_folder, tmp_path / "models"]) == llama
    assert locate_model("sdxl", [recipe_folder, tmp_path / "models"]) == tmp_path / "models" / "sdxl"
    with pytest.raises(ModelNameError):
        locate_model("model", [recipe_folder, tmp_path / "models"])


@pytest.mark.parametrize(
    "files",
    [
        ["pytorch_model.bin"],
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"],
        ["pytorch_model.fp16-00001-of-00001.bin", "pytorch_model.bin.index.fp16.json"],
        ["diffusion_pytorch_model.bin"],
        ["diffusion_pytorch_model.fp16.bin"],
        ["consolidated.00.pth"],
        ["unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin"],
        ["transformer/diffusion_pytorch_model.fp16.bin"],
    ],
)
def test_a_folder_of_pickles_is_a_model_as_one_of_safetensors_is(
    recipe_folder: Path, tmp_path: Path, files: list[str]
) -> None:
    for folder in (recipe_folder / "near", tmp_path / "models" / "deep"):
        for name in (*files, "config.json"):
            touch(folder / name)
    folders = [recipe_folder, tmp_path / "models"]
    assert locate_model(str(recipe_folder / "near"), folders) == recipe_folder / "near"
    assert locate_model("near", folders) == recipe_folder / "near"
    assert locate_model("deep", folders) == tmp_path / "models" / "deep"


@pytest.mark.parametrize("name", ["ghost.ckpt", "cat.bin", "training_args.bin", "unet/notes.bin", "my_model.bin"])
def test_a_folder_with_pickles_of_other_names_is_none(recipe_folder: Path, name: str) -> None:
    touch(recipe_folder / "loose" / name)
    with pytest.raises(ModelNameError, match="no model is named 'loose'"):
        locate_model("loose", [recipe_folder])


def test_a_folder_of_loose_models_is_searched_not_taken_for_one(recipe_folder: Path, tmp_path: Path) -> None:
    found = touch(tmp_path / "models" / "checkpoints" / "ghost.safetensors")
    assert locate_model("ghost", [recipe_folder, tmp_path / "models"]) == found


def test_a_name_that_fits_none_gets_the_nearest_and_the_folders_searched(recipe_folder: Path, tmp_path: Path) -> None:
    touch(tmp_path / "models" / "ghostmix_v20.safetensors")
    touch(recipe_folder / "deliberate.safetensors")
    folders = [recipe_folder, tmp_path / "models"]
    with pytest.raises(ModelNameError, match="no model is named 'ghostmix_v2O'") as caught:
        locate_model("ghostmix_v2O", folders)
    assert caught.value.hint is not None
    assert "did you mean 'ghostmix_v20'" in caught.value.hint
    assert str(tmp_path / "models") in caught.value.hint and str(recipe_folder) in caught.value.hint
    with pytest.raises(ModelNameError) as caught:
        locate_model("delibrate", folders)
    assert "'deliberate'" in str(caught.value)
    with pytest.raises(ModelNameError) as caught:
        locate_model("zzz", folders)
    assert caught.value.hint == f"searched {recipe_folder}, {tmp_path / 'models'}; --models-dir adds a folder"


def test_loops_of_links_and_hidden_folders_are_left_out(recipe_folder: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    found = touch(models / "a" / "ghost.safetensors")
    (models / "a" / "loop").symlink_to(models)
    (models / "self").symlink_to(models / "self")
    (models / "broken.safetensors").symlink_to(tmp_path / "nowhere")
    touch(models / ".trash" / "ghost.ckpt")
    assert locate_model("ghost", [recipe_folder, models]) == found
    with pytest.raises(ModelNameError, match="no model is named 'broken'"):
        locate_model("broken", [recipe_folder, models])


def test_folders_that_are_not_there_are_passed_over(recipe_folder: Path, tmp_path: Path) -> None:
    found = touch(tmp_path / "models" / "ghost.safetensors")
    assert locate_model("ghost", [recipe_folder, tmp_path / "unplugged", tmp_path / "models"]) == found
    assert locate_model("ghost", [tmp_path / "unplugged", tmp_path / "models"]) == found


@pytest.mark.parametrize("name", ["", "\0", "a\0b", "half \ud800"])
def test_what_no_file_can_be_named_is_refused(recipe_folder: Path, name: str) -> None:
    with pytest.raises(ModelNameError, match="is no name of a model"):
        locate_model(name, [recipe_folder])


@pytest.mark.parametrize("name", ["x" * 5000, "/".join("x" * 3000), "~nobody-of-this-name/x", ".", "..", "/", "a/../b"])
def test_strange_names_are_refused_like_any_other(recipe_folder: Path, name: str) -> None:
    with pytest.raises(ModelNameError, match="no model is named") as caught:
        locate_model(name, [recipe_folder])
    assert len(caught.value.message) < 250


def test_looking_among_thousands_of_files_takes_moments(recipe_folder: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for number in range(3000):
        (models / f"model-{number:05d}.safetensors").touch()
    began = time.process_time()
    with pytest.raises(ModelNameError, match="no model is named"):
        locate_model("model-0300", [recipe_folder, models])
    assert time.process_time() - began < 5


def test_folders_come_from_the_option_the_environment_and_the_file_in_that_order(tmp_path: Path) -> None:
    for name in ("given", "one", "two", "listed"):
        (tmp_path / name).mkdir()
    config = tmp_path / "config.toml"
    config.write_text(f"models_dirs = [{str(tmp_path / 'listed')!r}, {str(tmp_path / 'one')!r}]")
    environment = {"REMELT_MODELS_DIR": os.pathsep.join([str(tmp_path / "one"), "", str(tmp_path / "two")])}
    found = models_folders([tmp_path / "given"], environment, config)
    assert found == [tmp_path / name for name in ("given", "one", "two", "listed")]


def test_comfyui_and_a1111_stand_for_their_models_folders(tmp_path: Path) -> None:
    comfyui = [tmp_path / "ComfyUI" / "models" / part for part in ("checkpoints", "diffusion_models", "loras")]
    a1111 = [tmp_path / "webui" / "models" / part for part in ("Stable-diffusion", "Lora")]
    for folder in (*comfyui, *a1111, tmp_path / "ComfyUI" / "models" / "upscale_models"):
        folder.mkdir(parents=True)
    config = tmp_path / "config.toml"
    config.write_text(f"comfyui = {str(tmp_path / 'ComfyUI')!r}\na1111 = {str(tmp_path / 'webui')!r}")
    assert models_folders([], {}, config) == [*comfyui, *a1111]


def test_no_file_no_environment_no_folders(tmp_path: Path) -> None:
    assert models_folders([], {}, tmp_path / "absent.toml") == []


def test_the_configuration_file_is_found_by_the_environment(tmp_path: Path) -> None:
    assert config_path({"REMELT_CONFIG": str(tmp_path / "my.toml")}) == tmp_path / "my.toml"
    assert config_path({}).parts[-2:] == ("remelt", "config.toml")


def test_the_users_configuration_folder_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert config_path({"XDG_CONFIG_HOME": str(tmp_path)}) == tmp_path / "remelt" / "config.toml"
    monkeypatch.setattr("sys.platform", "win32")
    assert config_path({"APPDATA": str(tmp_path)}) == tmp_path / "remelt" / "config.toml"


def test_a_folder_given_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="absent is not a folder"):
        models_folders([tmp_path / "absent"], {}, tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"models_dirs = [", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"models_dir = 'x'", "it has models_dir"),
        (b"models_dirs = 'x'", "its values are paths as text"),
        (b"models_dirs = [1]", "its values are paths as text"),
        (b"comfyui = ['x']", "its values are paths as text"),
        (b"models_dirs = [" + b"[" * 100_000, "cannot be read"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(tmp_path: Path, text: bytes, expected: str) -> None:
    (tmp_path / "config.toml").write_bytes(text)
    with pytest.raises(OptionError, match=expected) as caught:
        models_folders([], {}, tmp_path / "config.toml")
    assert "config.toml" in str(caught.value)
