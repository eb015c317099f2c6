"""The command line, as people use it: what it writes, what it says, and the code that it exits with."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import remelt as rm
from remelt.cli.main import COMMANDS, run

RECIPE = """version 1
# A and B in equal parts, then C by block
a = model("a")
b = model("b")
mixed = weighted_sum(a, b, alpha=0.5)
weighted_sum(mixed, "c", alpha=blocks({"layers.1": 0.2}) | 0.33)
"""


@pytest.fixture
def folder(tmp_path: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate("abc"):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.attn.weight": torch.randn(6, 6, generator=generator) for i in range(3)}
        write_model(tmp_path / name, tensors)
    (tmp_path / "mix.mecha").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REMELT_CONFIG", str(tmp_path / "none.toml"))
    monkeypatch.delenv("REMELT_MODELS_DIR", raising=False)
    return tmp_path


@pytest.fixture
def remelt(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line; its exit code, what it printed, and what it said beside."""

    def call(*words: str) -> tuple[int, str, str]:
        code = run(list(words))
        out, err = capsys.readouterr()
        return code, out, err

    return call


Remelt = Callable[..., tuple[int, str, str]]


def test_a_recipe_is_merged_to_its_own_name_or_where_asked(folder: Path, remelt: Remelt) -> None:
    code, out, _ = remelt("merge", "mix.mecha")
    assert code == 0
    assert "wrote mix.safetensors" in out
    assert remelt("merge", "mix.mecha", "-o", "other.safetensors", "-q") == (0, "", "")
    assert (folder / "mix.safetensors").read_bytes() == (folder / "other.safetensors").read_bytes()


def test_models_are_merged_by_a_method_without_any_file(folder: Path, remelt: Remelt) -> None:
    code, _, err = remelt("merge", "a", "b", "-m", "weighted_sum", "-p", "alpha", "0.3", "-o", "ab.safetensors")
    assert (code, err) == (0, "")
    a, b, ab = (load_file(f"{name}.safetensors") for name in ("a", "b", "ab"))
    key = "layers.0.attn.weight"
    assert torch.equal(ab[key], torch.lerp(a[key], b[key], 0.3))
    code, _, _ = remelt(
        "merge", "a", "b", "-m", "weighted_sum", "-p", "alpha", 'blocks({"layers.0": 1}) | 0', "-o", "blocks"
    )
    assert code == 0
    assert torch.equal(load_file("blocks.safetensors")[key], b[key])


def test_several_recipes_go_to_a_folder_and_share_their_reads(folder: Path, remelt: Remelt) -> None:
    (folder / "second.mecha").write_text('version 1\nweighted_sum("a", "b", alpha=0.9)\n')
    code, out, err = remelt("merge", "mix.mecha", "second.mecha", "-o", "merges/", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert [Path(path).name for path in told["outputs"]] == ["mix.safetensors", "second.safetensors"]
    (plan,) = told["plans"]
    assert plan["bytes_read"] == sum(given["size"] for given in plan["inputs"])
    remelt("merge", "second.mecha")
    assert (folder / "merges" / "second.safetensors").read_bytes() == (folder / "second.safetensors").read_bytes()


def test_a_result_runs_its_own_recipe_again(folder: Path, remelt: Remelt) -> None:
    remelt("merge", "mix.mecha")
    assert remelt("merge", "mix.safetensors", "-o", "again.safetensors")[0] == 0
    assert (folder / "mix.safetensors").read_bytes() == (folder / "again.safetensors").read_bytes()


def test_a_plan_tells_everything_and_writes_nothing(folder: Path, remelt: Remelt) -> None:
    code, out, _ = remelt("plan", "mix.mecha")
    assert code == 0
    for word in ("a.safetensors  3 tensors", "reads        1.27 KiB", "free)", "peak memory", "time         about"):
        assert word in out, word
    assert not (folder / "mix.safetensors").exists()
    code, out, _ = remelt("plan", "mix.mecha", "--json")
    (record,) = json.loads(out)
    assert record["bytes_read"] == 3 * 3 * 36 * 4
    assert record["free_disk"] > 0


def test_a_plan_that_would_be_refused_exits_with_3(
    folder: Path, remelt: Remelt, write_model: Callable[..., Path]
) -> None:
    write_model(folder / "b", {"layers.0.attn.weight": torch.zeros(6, 6)})
    code, out, err = remelt("plan", "mix.mecha")
    assert (code, out) == (3, "")
    assert "refused: 1 problem in 3 inputs" in err
    assert "lacks 2 keys that a.safetensors has" in err


def test_composing_fills_parameters_and_warns_of_models_that_are_not_there_yet(folder: Path, remelt: Remelt) -> None:
    (folder / "base.mecha").write_text('version 1\nweighted_sum(parameter("x"), parameter("y"), alpha=0.25)\n')
    code, out, err = remelt("compose", "base.mecha", "-p", "x", "mix.mecha", "-p", "y", "later", "-o", "full.mecha")
    assert (code, out) == (0, "wrote full.mecha\n")
    assert "warning: no model is named 'later'; merge will need it" in err
    code, _, err = remelt("merge", "full.mecha")
    assert code == 3
    assert "no model is named 'later'" in err
    code, out, _ = remelt("compose", "base.mecha", "-p", "x", "a", "--json")
    assert json.loads(out)["open_parameters"] == ["y"]
    code, _, err = remelt("compose", "base.mecha", "-p", "z", "a")
    assert code == 3
    assert "the recipe has no parameter 'z'" in err


def test_inspecting_tells_what_a_file_is(folder: Path, remelt: Remelt) -> None:
    remelt("merge", "mix.mecha")
    code, out, _ = remelt("inspect", "mix.safetensors", "--deep")
    assert code == 0
    for word in ("tensors     3 (3 F32), 432 B, 3 blocks", 'a = model("a")', "finite      every tensor"):
        assert word in out, word
    code, out, _ = remelt("inspect", "a", "--json")
    assert json.loads(out)["recipe"] is None


def test_info_lists_archs_and_methods_and_describes_each(remelt: Remelt) -> None:
    code, out, _ = remelt("info")
    assert code == 0
    assert "sdxl" in out
    assert "weighted_sum(a, b, *, alpha=0.5)" in out
    code, out, _ = remelt("info", "weighted_sum")
    assert "(1 - alpha) * a + alpha * b" in out
    code, _, err = remelt("info", "slrp")
    assert code == 2
    assert "did you mean 'slerp' or 'nuslerp'?" in err


def test_doctor_tells_what_there_is(remelt: Remelt) -> None:
    code, out, _ = remelt("doctor", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["torch"] == torch.__version__
    assert told["remelt"] == rm.__version__
    assert told["native"].split(":")[0] in ("avx512", "avx2", "plain", "absent")
    assert {"demo", "test", "check", "docs"} <= set(told["extras"])


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["merg"], 2, "did you mean 'merge'?"),
        (["merge"], 2, "Missing argument"),
        (["merge", "mix.mecha", "--mising", "first"], 2, "--missing"),
        (["merge", "mix.mecha", "--missing", "frist"], 2, "'error', 'first', 'skip'"),
        (["merge", "mixx.mecha"], 2, "there is no recipe 'mixx.mecha'"),
        (["merge", "a", "b"], 2, "several models need a method"),
        (["merge", "a", "b", "-m", "weigthed_sum"], 3, "did you mean 'weighted_sum'?"),
        (["merge", "a", "b", "-m", "weighted_sum", "-p", "alhpa", "1"], 3, "did you mean 'alpha'?"),
        (
            ["merge", "a", "b", "-m", "weighted_sum", "-p", "alpha", "x"],
            3,
            "weighted_sum needs a number, block weights or a tensor for 'alpha', but got 'x'",
        ),
        (["merge", "a", "bb", "-m", "weighted_sum"], 3, "no model is named 'bb'"),
        (["merge", "a.safetensors"], 3, "a.safetensors carries no recipe"),
        (["merge", "mix.mecha", "--memory", "lots"], 2, "'lots' is not an amount of bytes"),
        (["merge", "mix.mecha", "-o", "a.safetensors"], 3, "--overwrite replaces it"),
        (["merge", "mix.mecha", "-o", "mix.ckpt"], 2, "results are written as safetensors"),
        (["merge", "mix.mecha", "--device", "abacus"], 2, "abacus"),
        (["inspect", "nothing"], 3, "no model is named 'nothing'"),
        (["compose", "mix.mecha", "-p", "a"], 2, "requires 2 arguments"),
    ],
)
def test_a_mistake_is_told_with_its_remedy_and_without_a_traceback(
    folder: Path, remelt: Remelt, words: list[str], code: int, said: str
) -> None:
    found, out, err = remelt(*words)
    assert (found, out) == (code, ""), err
    assert said in err
    assert "Traceback" not in err


def test_an_error_in_a_recipe_shows_the_line_and_a_caret(folder: Path, remelt: Remelt) -> None:
    (folder / "mix.mecha").write_text(RECIPE.replace("alpha=0.5", "alhpa=0.5"))
    code, _, err = remelt("merge", "mix.mecha")
    assert code == 3
    assert err == (
        "mix.mecha:5:28: weighted_sum has no argument 'alhpa'\n"
        "    mixed = weighted_sum(a, b, alhpa=0.5)\n"
        "                               ^^^^^\n"
        "hint: did you mean 'alpha'? weighted_sum(a, b, *, alpha=0.5)\n"
    )


def test_errors_are_json_where_asked(folder: Path, remelt: Remelt) -> None:
    code, out, err = remelt("merge", "a", "b", "-m", "add_difference", "--json")
    assert (code, err) == (3, "")
    assert json.loads(out)["error"] == "add_difference needs a delta for 'b', but got a weight"


def test_models_are_found_in_models_folders(folder: Path, remelt: Remelt, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    words = ["merge", "a", "b", "-m", "weighted_sum", "--overwrite", "-o", "x.safetensors", "-q"]
    assert remelt(*words)[0] == 3
    assert remelt(*words, "--models-dir", str(folder))[0] == 0
    monkeypatch.setenv("REMELT_MODELS_DIR", str(folder))
    assert remelt(*words)[0] == 0
    monkeypatch.delenv("REMELT_MODELS_DIR")
    (folder / "none.toml").write_text(f"models_dirs = [{str(folder)!r}]\n")
    assert remelt(*words)[0] == 0


def test_a_plugin_brings_a_method(folder: Path, remelt: Remelt) -> None:
    (folder / "mine.py").write_text(
        "from __future__ import annotations\n"
        "from remelt.recipe.method import Same, merge_method\n\n\n"
        "@merge_method(cut='element')\n"
        "def larger_of_two(a: Same, b: Same) -> Same:\n"
        "    '''The larger element.'''\n"
        "    return a.maximum(b)\n"
    )
    assert remelt("merge", "a", "b", "-m", "larger_of_two", "--plugin", "mine.py", "-o", "max.safetensors")[0] == 0
    a, b = load_file("a.safetensors"), load_file("b.safetensors")
    assert all(torch.equal(value, a[key].maximum(b[key])) for key, value in load_file("max.safetensors").items())


def process(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, check=False, **options)


def test_help_never_loads_torch_and_comes_at_once() -> None:
    for words in (["--help"], ["--version"]):
        code = f"from remelt.cli.main import run; import sys; run({words!r}); "
        code += "print('torch' in sys.modules, file=sys.stderr)"
        found = process("-c", code)
        assert found.stderr == "False\n", found.stderr
    found = process("-m", "remelt", "--help")
    assert found.returncode == 0
    assert all(command in found.stdout for command in COMMANDS)


def test_composing_never_loads_torch(folder: Path) -> None:
    code = (
        "import sys; from remelt.cli.main import run\n"
        "assert run(['compose', 'mix.mecha']) == 0\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    found = process("-c", code)
    assert found.stderr == "False\n", found.stderr
    assert found.stdout.startswith("version 1\n")


def test_importing_remelt_never_loads_torch() -> None:
    assert process("-c", "import sys, remelt; assert 'torch' not in sys.modules").returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="signals as on POSIX")
def test_an_interrupt_exits_with_130_and_publishes_nothing(folder: Path, write_model: Callable[..., Path]) -> None:
    import signal

    write_model(folder / "big", {f"w{i}": torch.zeros(1000, 1000) for i in range(40)})
    (folder / "slow.py").write_text(
        "from __future__ import annotations\nimport time\nimport sys\n"
        "from remelt.recipe.method import Same, merge_method\n\n\n"
        "@merge_method(cut='element')\n"
        "def slow_copy(a: Same) -> Same:\n    '''Slowly.'''\n"
        "    print('working', flush=True)\n    time.sleep(0.05)\n    return a + 0\n"
    )
    command = [
        sys.executable,
        "-m",
        "remelt",
        "merge",
        "big",
        "-m",
        "slow_copy",
        "--plugin",
        "slow.py",
        "-o",
        "o.safetensors",
    ]
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores the signal, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert running.stdout is not None
    running.stdout.readline()
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted: nothing was published" in err
    assert not list(folder.glob("o.safetensors*"))


def test_verify_tells_what_is_wrong_and_exits_with_4(folder: Path, remelt: Remelt) -> None:
    remelt("merge", "mix.mecha", "-q")
    code, out, err = remelt("verify", "mix.safetensors", "--all")
    assert (code, err) == (0, "")
    for line in ("checksum    fits", "finite      every tensor", "recipe      3 of 3 tensors computed again"):
        assert line in out
    content = bytearray(Path("mix.safetensors").read_bytes())
    content[-1] ^= 1
    Path("mix.safetensors").write_bytes(content)
    code, out, err = remelt("verify", "mix.safetensors", "--recipe")
    assert code == 4
    assert "checksum    differs" in out
    assert "error: mix.safetensors is not what it should be:" in err
    code, out, _ = remelt("verify", "a", "--json")
    assert (code, json.loads(out)["checksum"]) == (0, None)


def test_hash_and_lock_and_the_hash_of_a_result(folder: Path, remelt: Remelt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMELT_CACHE", str(folder / "cache"))
    digest = hashlib.sha256((folder / "a.safetensors").read_bytes()).hexdigest()
    code, out, _ = remelt("hash", "a", "b")
    assert code == 0
    assert f"sha256   {digest}\nautov2   {digest[:10]}\ntensors  " in out
    assert json.loads(remelt("hash", "a", "--json")[1])[0]["sha256"] == digest
    code, out, err = remelt("lock", "mix.mecha", "-o", "locked.mecha")
    assert (code, err) == (0, "")
    assert f"{digest[:16]}  a\n" in out
    assert "# A and B in equal parts, then C by block" in Path("locked.mecha").read_text()
    assert remelt("lock", "mix.mecha", "-o", "locked.mecha")[0] == 3
    code, out, _ = remelt("merge", "locked.mecha", "--hash")
    assert code == 0
    assert f"sha256 {hashlib.sha256(Path('locked.safetensors').read_bytes()).hexdigest()}\n" in out
    code, _, err = remelt("lock", "locked.safetensors")
    assert code == 3
    assert "its locked recipe needs a file\nhint: -o recipe.mecha" in err
    assert remelt("lock", "locked.safetensors", "-o", "again.mecha")[0] == 0
    assert remelt("lock", "mix.mecha")[0] == 0
    assert digest in Path("mix.mecha").read_text()


def test_options_in_a_result_are_used_again_unless_others_are_given(folder: Path, remelt: Remelt) -> None:
    remelt("merge", "mix.mecha", "-q", "--dtype", "bf16")
    assert remelt("merge", "mix.safetensors", "-o", "again.safetensors")[0] == 0
    assert Path("again.safetensors").read_bytes() == Path("mix.safetensors").read_bytes()
    assert remelt("merge", "mix.safetensors", "-o", "wide.safetensors", "--dtype", "fp32")[0] == 0
    assert load_file("wide.safetensors")["layers.0.attn.weight"].dtype is torch.float32
