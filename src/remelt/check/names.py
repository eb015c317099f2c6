"""Block weights held against the model: names that nothing has, with the nearest ones that it has."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence

from remelt.archs.dialects import ORIGINAL, Spelling, dialects_of, is_left_out, original_key
from remelt.archs.facts import Layout, layout
from remelt.check.bound import BoundGraph, Step, numbers_of
from remelt.check.inputs import Input, keys_of
from remelt.check.report import fold_keys
from remelt.core.nearest import nearest_hint
from remelt.errors import Problem, RecipeError
from remelt.recipe.blocks import BLOCKS, CLASSES, COMPONENTS, DEPTH, KEYS, PRESET, BlockWeights, Rule


def check_names(graph: BoundGraph, steps: list[int], layout: Layout) -> list[Problem]:
    """A problem for every name in block weights, and every picked or omitted component, that the model lacks."""
    problems: list[Problem] = []
    checked: set[BlockWeights] = set()
    for index in steps:
        step = graph.steps[index]
        for name, value in numbers_of(step.values):
            if isinstance(value, BlockWeights):
                if value not in checked:
                    checked.add(value)
                    problems += [
                        _problem(step, name, *found) for rule in value.rules for found in _unknown(rule, layout)
                    ]
            elif _selects(step) and isinstance(value, str) and value not in _selectable(step, layout):
                problems.append(_problem(step, name, *_no("component", value, component_names(layout))))
    return problems


def check_donors(graph: BoundGraph, steps: list[int], inputs: Mapping[int, Input], spelling: Spelling) -> list[Problem]:
    """A problem for every model that is to give another one a component, and has none, or a part of it."""
    problems: list[Problem] = []
    for index in steps:
        step = graph.steps[index]
        if step.method is None or step.method.name != "fallback":
            continue
        rest, part = (graph.steps[operand] for _, operand in step.operands)
        if not (_does(rest, "omit_component") and _does(part, "pick_component") and rest.values == part.values):
            continue
        owners, donors = ([inputs[one] for one in graph.models_of(below.operands[0][1])] for below in (rest, part))
        problems += _lacks_of_donors(owners, donors, str(dict(part.values)["component"]), spelling)
    return problems


def _lacks_of_donors(
    owners: Sequence[Input], donors: Sequence[Input], component: str, spelling: Spelling
) -> Iterator[Problem]:
    """What models lack that are to give a component to others: all of it, or keys that the others have there."""
    own, held = (
        layout(keys_of(given), next((one.detection.arch for one in given if one.detection.arch), None), spelling)
        for given in (owners, donors)
    )
    label, span = donors[0].label, donors[0].model.span
    if component not in component_names(held):
        has = ", ".join(held.components) or "no component that is known"
        yield Problem(label, f"has no {component} to give", f"it has {has}", span)
        return
    wanted = own.components.get(own.component_aliases.get(component, component), ())
    given = set(held.keys)
    lacking = [key for key in wanted if key not in given and not _does_without(key, own, spelling)]
    if lacking:
        what = f"{len(lacking)} of the {len(wanted)} keys that the {component} of {owners[0].label} has"
        hint = f'fallback(pick_component("{label}", "{component}"), ...) in a recipe keeps the model\'s own'
        yield Problem(label, f"has no whole {component} to give: it lacks {what}: {fold_keys(lacking)}", hint, span)


def _does_without(key: str, layout: Layout, spelling: Spelling) -> bool:
    """Whether a component works without a key: what is never merged, and what some of its layouts have no place for."""
    arch = layout.arch
    if key in layout.copied or arch is None:
        return key in layout.copied
    original = original_key(arch, spelling, key)
    return any(is_left_out(arch, dialect, original) for dialect in dialects_of(arch) if dialect != ORIGINAL)


def _does(step: Step, method: str) -> bool:
    return step.method is not None and step.method.name == method


def _selects(step: Step) -> bool:
    return step.method is not None and step.method.declaration.selects is not None


def _selectable(step: Step, layout: Layout) -> list[str]:
    """What a step may pick or omit: to omit what the arch may have, and the model has not, changes nothing."""
    known = component_names(layout)
    if step.method is not None and step.method.name == "omit_component" and layout.arch is not None:
        known += [name for one in layout.arch.components for name in (one.name, *one.aliases)]
    return known


def component_names(layout: Layout) -> list[str]:
    """The components of a model, aliases included."""
    return [*layout.components, *layout.component_aliases]


def _problem(step: Step, argument: str, message: str, hint: str | None) -> Problem:
    spans = {} if step.input is not None else dict(step.node.spans)  # type: ignore[union-attr]
    return Problem("", message, None if hint is None else f"hint: {hint}", spans.get(argument, step.span))


def _no(kind: str, name: str, known: object) -> tuple[str, str | None]:
    names = sorted(known)  # type: ignore[call-overload]
    hint = nearest_hint(name, names)
    if hint is None:
        shown = names if len(names) <= 12 else [*names[:12], "..."]
        hint = f"it has {', '.join(shown)}" if names else f"it has no {kind}s"
    return f"the model has no {kind} {name!r}", hint


def _unknown(rule: Rule, layout: Layout) -> Iterator[tuple[str, str | None]]:
    if rule.kind == BLOCKS:
        for name, _ in rule.named:
            if name in layout.ambiguous:
                yield f"block {name!r} may be any of {', '.join(layout.ambiguous[name])}", "write one of them in full"
            elif name not in layout.block_names:
                yield _no("block", name, layout.block_names)
    elif rule.kind == COMPONENTS:
        for name, _ in rule.named:
            if name not in component_names(layout):
                yield _no("component", name, component_names(layout))
    elif rule.kind == CLASSES:
        facts = [layout.facts(key) for key in layout.keys]
        for name, _ in rule.named:
            if not any(layout.matches_class(fact, name) for fact in facts):
                yield _no("layer class", name, layout.layer_classes)
    elif rule.kind == KEYS and not rule.optional:
        for pattern, _ in rule.named:
            matcher = re.compile(fnmatch.translate(pattern))
            if not any(matcher.match(key) for key in layout.keys):
                yield f"no key matches {pattern!r}", nearest_hint(pattern, layout.keys)
    elif rule.kind == PRESET:
        try:
            layout.preset_names(len(rule.listed))
        except RecipeError as error:
            yield error.message, error.hint
    elif rule.kind == DEPTH and rule.stack is not None:
        stacks = {stack for key in layout.keys if (stack := layout.facts(key).stack) is not None}
        if not any(stack == rule.stack or stack.endswith("." + rule.stack) for stack in stacks):
            yield _no("stack", rule.stack, stacks)
