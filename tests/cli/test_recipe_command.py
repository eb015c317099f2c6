"""`remelt recipe`, and what other commands do with recipes of older grammars."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from remelt.cli.main import run

OLD = 'version 0.1.0\n# the first\nmodel "a"\nmodel "b"\nmerge "weighted_sum" &0 &1 alpha=0.25\n'
LOOSE = 'version 1\n# half\nx=model("a")\nweighted_sum(x,"b",alpha = .5) # a tail\n'
Remelt = Callable[..., tuple[int, str, str]]


@pytest.fixture
def remelt(
    tmp_path: Path,
    write_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Remelt:
    for number, name in enumerate("ab"):
        write_model(tmp_path / name, {"layers.0.w": torch.full((2, 2), float(number))})
    (tmp_path / "old.mecha").write_text(OLD)
    (tmp_path / "loose.mecha").write_text(LOOSE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REMELT_CONFIG", str(tmp_path / "none.toml"))

    def call(*words: str) -> tuple[int, str, str]:
        code = run(list(words))
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_an_old_recipe_is_converted_and_merged_alike(remelt: Remelt) -> None:
    code, out, _ = remelt("recipe", "convert", "old.mecha", "-o", "new.mecha")
    assert (code, out) == (0, "wrote new.mecha\n")
    assert "# the first" in Path("new.mecha").read_text()
    assert remelt("recipe", "convert", "old.mecha", "-o", "new.mecha")[0] == 3
    assert remelt("recipe", "convert", "old.mecha", "-o", "new.mecha", "--overwrite")[0] == 0
    for name in ("old", "new"):
        assert remelt("merge", f"{name}.mecha", "-q")[0] == 0
    old, new = (Path(f"{name}.safetensors").read_bytes() for name in ("old", "new"))
    assert old[-16:] == new[-16:]
    _, out, _ = remelt("recipe", "convert", "new.mecha", "--to", "0.1.0", "--json")
    assert json.loads(out)["text"].splitlines()[-1] == 'merge "weighted_sum" &0 &1 alpha=0.25'
    code, out, _ = remelt("recipe", "convert", "old.safetensors")
    assert (code, out.splitlines()[-1]) == (0, "weighted_sum(a, b, alpha=0.25)")


def test_a_file_that_sd_mecha_merged_carries_its_recipe(remelt: Remelt, write_model: Callable[..., Path]) -> None:
    write_model(Path("theirs"), {"layers.0.w": torch.zeros(2, 2)}, {"mecha_recipe": OLD})
    code, out, _ = remelt("recipe", "convert", "theirs.safetensors")
    assert (code, out.splitlines()[-1]) == (0, "weighted_sum(step_0, b, alpha=0.25)")
    assert remelt("merge", "theirs.safetensors", "-o", "again.safetensors", "-q")[0] == 0


def test_a_layout_is_checked_and_then_made(remelt: Remelt) -> None:
    assert remelt("recipe", "fmt", "--check", "loose.mecha") == (1, "would rewrite loose.mecha\n", "")
    assert Path("loose.mecha").read_text() == LOOSE
    assert remelt("recipe", "fmt", "loose.mecha") == (0, "rewrote loose.mecha\n", "")
    assert Path("loose.mecha").read_text().startswith('version 1\n# half\nx = model("a")\n')
    assert remelt("recipe", "fmt", "--check", "loose.mecha")[0] == 0
    _, out, _ = remelt("recipe", "fmt", "loose.mecha", "--json")
    assert json.loads(out) == {"changed": [], "written": True}


def test_an_old_recipe_is_not_rewritten_in_place(remelt: Remelt) -> None:
    code, _, err = remelt("recipe", "fmt", "old.mecha")
    assert code == 3
    assert "old.mecha is written in another grammar (version 0.1.0)\nhint: remelt recipe convert" in err
    code, _, err = remelt("lock", "old.mecha")
    assert code == 3
    assert "old.mecha is written in another grammar (version 0.1.0), which knows no locks\nhint: -o NEW.mecha" in err
    assert Path("old.mecha").read_text() == OLD
    assert remelt("lock", "old.mecha", "-o", "locked.mecha")[0] == 0
    assert Path("locked.mecha").read_text().count("sha256=") == 2


def test_a_picture_is_drawn(remelt: Remelt) -> None:
    code, out, _ = remelt("recipe", "draw", "old.mecha")
    assert code == 0
    assert out.startswith("flowchart LR\n")
    assert remelt("recipe", "draw", "old.mecha", "--to", "dot", "-o", "old.dot")[0] == 0
    assert Path("old.dot").read_text().startswith("digraph recipe {")
    assert remelt("recipe", "draw", "old.mecha", "--to", "png")[0] == 2


def test_a_mistake_at_every_step(remelt: Remelt) -> None:
    assert remelt("recipe")[0] == 2
    assert remelt("recipe", "convert", "missing.mecha")[0] == 2
    assert remelt("recipe", "convert", "old.mecha", "--to", "2")[0] == 2
    assert remelt("recipe", "convert", "old.mecha", "-o", ".")[0] == 3
    assert remelt("recipe", "convert", "a.safetensors")[0] == 3
    Path("bad.mecha").write_text(OLD.replace("&1", "&7"))
    code, _, err = remelt("merge", "bad.mecha")
    assert (code, err.splitlines()[0]) == (3, "bad.mecha:5:25: &7 is no earlier result: there are 2 before it")


def test_models_beside_a_recipe_are_found_from_where_it_is_written(
    remelt: Remelt, write_model: Callable[..., Path]
) -> None:
    for seed, name in enumerate("ab"):
        write_model(Path("sub") / name, {"w": torch.full((3,), float(seed))})
    Path("sub/old.mecha").write_text(
        'version 0.1.0\nmodel "a" model_config=null merge_space="weight"\n'
        'model "b.safetensors" model_config=null merge_space="weight"\nmerge "weighted_sum" &0 &1 alpha=0.5\n'
    )
    Path("sub/new.mecha").write_text(
        'version 1\n# mixed\nmixed = weighted_sum("a", "b", alpha=0.5)\ncast(mixed, "fp32")\n'
    )
    assert remelt("recipe", "convert", "sub/old.mecha", "-o", "converted.mecha")[0] == 0
    assert remelt("lock", "sub/new.mecha", "-o", "locked.mecha")[0] == 0
    assert "# mixed" in Path("locked.mecha").read_text()
    for name in ("converted", "locked"):
        assert remelt("merge", f"{name}.mecha", "-o", f"{name}.safetensors")[0] == 0
        assert load_file(f"{name}.safetensors")["w"].tolist() == [0.5, 0.5, 0.5]


def test_names_are_drawn_as_they_are(remelt: Remelt) -> None:
    Path("odd.mecha").write_text('version 1\nweighted_sum("a$^$b", "cost$5 vs $6_a_b", alpha=0.5)\n')
    assert remelt("recipe", "draw", "odd.mecha", "--to", "svg", "-o", "odd.svg")[0] == 0
    assert "a$^$b" in Path("odd.svg").read_text()
    Path("line.mecha").write_text('version 1\nweighted_sum("a\\nb", "模型", alpha=0.5)\n')
    drawn = remelt("recipe", "draw", "line.mecha")[1]
    assert 'n0["a b"]' in drawn
    assert remelt("recipe", "draw", "line.mecha", "--to", "svg")[2] == ""
    Path("stack.mecha").write_text('version 1\nstack_layers(layers("a", 0, 3))\n')
    assert "start = 0<br/>stop = 3" in remelt("recipe", "draw", "stack.mecha")[1]
