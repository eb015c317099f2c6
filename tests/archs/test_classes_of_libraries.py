"""Blocks inferred from key names, held against the module lists that the model classes of two libraries really have.

The truth is what a class builds on the meta device: for each key of its state dict, the outermost ``nn.ModuleList``
that has at least two children, at least half of them nested deeper than one level, and the index there. A class counts
as right only where every key's inferred block is that one.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

from remelt.archs.structure import infer  # noqa: E402

SECONDS_PER_CLASS = 30
MOST_LAYERS = 8
MAPPINGS = (
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
)
"""The kinds of transformers' classes that are tried: the bare models, and those whose heads bring parts along."""

SAMPLE = (
    "transformers.LlamaForCausalLM",
    "transformers.Qwen3MoeForCausalLM",
    "transformers.T5ForConditionalGeneration",
    "transformers.CLIPModel",
    "transformers.WhisperModel",
    "transformers.GPT2LMHeadModel",
    "transformers.SwinModel",
    "transformers.Qwen2VLForConditionalGeneration",
    "diffusers.FluxTransformer2DModel",
    "diffusers.UNet2DConditionModel",
    "diffusers.AutoencoderKL",
    "diffusers.WanTransformer3DModel",
    "diffusers.SD3Transformer2DModel",
)


@dataclass(frozen=True)
class Outcome:
    """What became of one class: ``skipped`` says why it was not tried, ``wrong`` which keys are placed elsewhere."""

    name: str
    skipped: str | None = None
    wrong: tuple[str, ...] = ()


class TooSlowError(Exception):
    """A class took longer than its share."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Give up after so long, where the system has alarms (Windows has none)."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlowError(f"not built within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def module_list_blocks(model: Any) -> dict[str, str | None]:
    """Each key of the state dict with the block that the modules themselves give."""
    keys = list(model.state_dict())
    lists = {name: module for name, module in model.named_modules(remove_duplicate=False)
             if isinstance(module, torch.nn.ModuleList)}  # fmt: skip
    children: dict[str, dict[str, bool]] = {}
    for key in keys:
        segments = key.split(".")
        for at in range(1, len(segments) - 1):
            path = ".".join(segments[:at])
            if path in lists:
                nested = children.setdefault(path, {})
                nested[segments[at]] = nested.get(segments[at], False) or len(segments) - at > 2
    stacks = {path for path, module in lists.items()
              if len(module) >= 2 and 2 * sum(children.get(path, {}).values()) >= len(module)}  # fmt: skip
    found: dict[str, str | None] = {}
    for key in keys:
        segments = key.split(".")
        ends = (at for at in range(1, len(segments)) if ".".join(segments[:at]) in stacks)
        end = next(ends, None)
        found[key] = None if end is None else ".".join(segments[: end + 1])
    return found


def class_names() -> list[str]:
    """Every class to try, each once."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    names: dict[str, None] = {}
    for mapping in MAPPINGS:
        for entry in getattr(auto, mapping).values():
            for name in entry if isinstance(entry, (tuple, list)) else (entry,):
                names[f"transformers.{name}"] = None
    for name in sorted(dir(diffusers)):
        with contextlib.suppress(Exception):
            found = getattr(diffusers, name)
            if (
                isinstance(found, type)
                and issubclass(found, diffusers.ModelMixin)
                and found is not diffusers.ModelMixin
            ):
                names[f"diffusers.{name}"] = None
    return list(names)


def small_config(config_class: Callable[..., object]) -> object:
    """A default configuration, with fewer layers where it has many: the names do not change."""
    config = config_class()
    if getattr(config, "num_hidden_layers", 0) > MOST_LAYERS:
        with contextlib.suppress(Exception):
            return config_class(num_hidden_layers=MOST_LAYERS)
    return config


def without_initialisation() -> contextlib.AbstractContextManager[None]:
    """Spare the work of filling tensors that have no memory, where the installed transformers can be told to."""
    for module in ("transformers.initialization", "transformers.modeling_utils"):
        with contextlib.suppress(ImportError, AttributeError):
            spared: contextlib.AbstractContextManager[None] = importlib.import_module(module).no_init_weights()
            return spared
    return contextlib.nullcontext()


def build(name: str) -> Any:
    """An instance on the meta device, from a default configuration."""
    library, _, class_name = name.partition(".")
    model_class = getattr(importlib.import_module(library), class_name)
    with torch.device("meta"):
        if library == "diffusers":
            return model_class()
        with without_initialisation():
            return model_class(small_config(model_class.config_class))


def judge(name: str) -> Outcome:
    """One class, built and compared."""
    try:
        with time_limit(SECONDS_PER_CLASS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            truth = module_list_blocks(build(name))
    except BaseException as error:  # a library's class may fail in any way; the reason is listed
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        lines = str(error).strip().splitlines() or [""]
        return Outcome(name, skipped=f"{type(error).__name__}: {lines[0][:100]}")
    if not truth:
        return Outcome(name, skipped="it has no keys")
    places = infer(truth).places
    return Outcome(name, wrong=tuple(key for key, block in truth.items() if places[key].block != block))


@pytest.mark.parametrize("name", SAMPLE)
def test_the_inferred_blocks_of_a_sampled_class_are_its_module_lists(name: str) -> None:
    if not inspect.isclass(getattr(importlib.import_module(name.partition(".")[0]), name.partition(".")[2], None)):
        pytest.skip(f"the installed library has no {name}")
    outcome = judge(name)
    assert outcome.skipped is None
    assert outcome.wrong == ()


@pytest.mark.slow
def test_the_inferred_blocks_of_all_classes_are_their_module_lists(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = [judge(name) for name in class_names()]
    tried = [outcome for outcome in outcomes if outcome.skipped is None]
    missed = [outcome for outcome in tried if outcome.wrong]
    with capsys.disabled():
        sys.stdout.write(report(outcomes) + "\n")
    assert len(tried) >= 350
    assert len(tried) - len(missed) >= 0.97 * len(tried)


def report(outcomes: list[Outcome]) -> str:
    """The figure, the classes that miss with their first key, and the skipped ones by reason."""
    tried = [outcome for outcome in outcomes if outcome.skipped is None]
    missed = [outcome for outcome in tried if outcome.wrong]
    lines = ["", f"blocks of {len(tried) - len(missed)} of {len(tried)} classes are exact"]
    lines += [f"  missed {outcome.name}: {len(outcome.wrong)} keys, {outcome.wrong[0]}" for outcome in missed]
    skipped = [outcome for outcome in outcomes if outcome.skipped is not None]
    reasons = Counter(outcome.skipped for outcome in skipped)
    lines += [f"  skipped {len(skipped)}"]
    for reason, count in reasons.most_common():
        names = ", ".join(outcome.name for outcome in skipped if outcome.skipped == reason)
        lines.append(f"    {count} for {reason}: {names}")
    return "\n".join(lines)
