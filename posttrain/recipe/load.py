"""From a YAML file and `--set` overrides to a validated recipe, or one report of all mistakes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from posttrain.errors import Problem, RecipeError, UsageError
from posttrain.recipe.adapters import ADAPTERS
from posttrain.recipe.recipe import STAGES, Recipe
from posttrain.recipe.test_sets import METRICS, TestSet
from posttrain.recipe.training import TrainingConfig


def load_recipe(file: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        file: a YAML file.
        overrides: `key=value` strings; the key is a path such as `datasets.chats.source`,
            `stages.sft.adapter.rank` or, for short, `sft.adapter.rank`; the value is YAML.

    Raises:
        RecipeError: with every mistake found, each with its key and what to write instead.
        UsageError: the file does not exist, or an override is not `key=value`.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{file}: no such recipe{_near_files(file)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from error
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        raise RecipeError([_yaml_problem(error)], file) from None
    if not isinstance(data, dict):
        problem = Problem("recipe", "is not a mapping of keys to values", "start with `name: ...`")
        raise RecipeError([problem], file)
    for override in overrides:
        apply_override(data, override)
    return validate_recipe(data, file=file, lines=_LineIndex(text))


def validate_recipe(
    data: Mapping[str, Any], file: Path | str | None = None, lines: _LineIndex | None = None
) -> Recipe:
    """Validate plain data as a recipe.

    Raises:
        RecipeError: with every mistake found.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        details = error.errors()
        # When its only stage is wrong, pydantic adds that no stage is left: nobody needs that.
        if any(detail["loc"][:1] == ("stages",) and len(detail["loc"]) > 1 for detail in details):
            details = [detail for detail in details if detail["loc"] != ("stages",)]
        problems = [_problem(detail, lines) for detail in details]
        raise RecipeError(problems, file) from None


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one value in a recipe's data, in place.

    Raises:
        UsageError: no `=`, or a path through something that has no keys.
    """
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UsageError(f"--set {override}: write key=value, such as sft.epochs=2")
    try:
        value = yaml.load(text, Loader=_StrictLoader) if text else None
    except yaml.YAMLError as error:
        raise UsageError(f"--set {override}: the value is not valid YAML: {error}") from None
    path = key.strip().replace("[", ".").replace("]", "").split(".")
    if path[0] not in Recipe.model_fields:
        path = ["stages", *path]
    target: Any = data
    for position, part in enumerate(path[:-1]):
        target = _descend(target, part, ".".join(path[: position + 1]), override)
    if not isinstance(target, dict):
        raise UsageError(f"--set {override}: `{'.'.join(path[:-1])}` has no keys")
    target[path[-1]] = value


def _descend(target: Any, part: str, path: str, override: str) -> Any:
    if isinstance(target, list):
        return _stage_body(target, part, override)
    if not isinstance(target, dict):
        raise UsageError(f"--set {override}: `{path}` has no keys")
    if target.get(part) is None:
        target[part] = {}
    return target[part]


def _stage_body(stages: list[Any], part: str, override: str) -> dict[str, Any]:
    """The settings of the stage with this name, kind or position."""
    named: list[dict[str, Any]] = []
    for position, entry in enumerate(stages):
        if isinstance(entry, str):
            entry = stages[position] = {entry: {}}
        if not isinstance(entry, dict) or len(entry) != 1:
            continue
        kind, body = next(iter(entry.items()))
        if body is None:
            body = entry[kind] = {}
        if not isinstance(body, dict):
            continue
        if part in (str(position), body.get("name")):
            # `stages[1].sft.epochs` names the kind as well: step through it.
            return entry if part == str(position) else body
        if kind == part:
            named.append(body)
    if len(named) == 1:
        return named[0]
    if named:
        raise UsageError(f"--set {override}: `{part}` occurs {len(named)} times; use its `name`")
    known = [next(iter(entry)) for entry in stages if isinstance(entry, dict) and entry]
    raise UsageError(
        f"--set {override}: no key or stage `{part}`{_near(part, [*known, *Recipe.model_fields])}"
    )


def _problem(detail: Any, lines: _LineIndex | None) -> Problem:
    """Turn one of pydantic's errors into a sentence with a remedy."""
    loc: tuple[str | int, ...] = tuple(detail["loc"])
    kind: str = detail["type"]
    context: dict[str, Any] = detail.get("ctx", {})
    where = _where(loc, lines)
    value = _short(detail.get("input"))
    if kind == "extra_forbidden":
        known = _known_keys(loc)
        near = _near(str(loc[-1]), known)
        return Problem(where, "there is no such key" + near, f"keys here: {', '.join(known)}")
    if kind == "missing":
        return Problem(where, "is missing", _describe(loc))
    if kind in ("literal_error", "enum"):
        return Problem(where, f"is {value}", f"write one of: {context.get('expected')}")
    if kind == "value_error":  # our own checks: their sentences stand by themselves
        return Problem(where, str(context.get("error", detail["msg"])))
    message = detail["msg"]
    message = message[0].lower() + message[1:]
    if kind in ("batch_size", "stage_body", "stage_kind", "stage_shape"):
        return Problem(where, message)
    return Problem(where, f"is {value}: {message}", _describe(loc))


def _where(loc: tuple[str | int, ...], lines: _LineIndex | None) -> str:
    text = ""
    for before, part in zip((None, *loc), loc, strict=False):
        if isinstance(part, int):
            text += f"[{part}]"
        elif _says_nothing(before, part):
            continue
        else:
            text += f".{part}" if text else part
    line = lines.find(loc) if lines else None
    return f"{text or 'recipe'} (line {line})" if line else text or "recipe"


def _says_nothing(before: str | int | None, part: str) -> bool:
    """Whether pydantic's name for a variant stands where no key of the recipe is."""
    if before == "adapter" and part in ADAPTERS:
        return True
    return part in ("function-before", "union") or part.startswith(("tuple[", "literal["))


def _model_at(loc: tuple[str | int, ...]) -> type[BaseModel]:
    """The recipe model that holds the key at `loc`."""
    model: type[BaseModel] = Recipe
    for part in loc[:-1]:
        if isinstance(part, str) and part in STAGES and model is Recipe:
            model = STAGES[part]
            continue
        if part in ADAPTERS and issubclass(model, TrainingConfig):
            model = ADAPTERS[str(part)]
            continue
        if part in METRICS and model is TestSet:
            model = METRICS[str(part)]
            continue
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is None:
            continue
        nested = _models_in(field.annotation)
        if len(nested) == 1:
            model = nested[0]
    return model


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    found: list[type[BaseModel]] = []
    for argument in getattr(annotation, "__args__", ()):
        found += _models_in(argument)
    return found


def _known_keys(loc: tuple[str | int, ...]) -> list[str]:
    fields = _model_at(loc).model_fields.items()
    return [field.alias or key for key, field in fields if key not in ("stage", "metric")]


def _describe(loc: tuple[str | int, ...]) -> str | None:
    """What the recipe model says of this key, for a message that helps."""
    field = _model_at(loc).model_fields.get(str(loc[-1])) if loc else None
    if field is None or not field.description:
        return None
    return f"`{loc[-1]}`: {' '.join(field.description.split())}"


def _near(word: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean `{matches[0]}`?" if matches else ""


def _near_files(file: Path) -> str:
    folder = file.parent
    if not folder.is_dir():
        return ""
    recipes = [path.name for path in folder.glob("*.yaml")]
    near = _near(file.name, recipes)
    return near or (f"; there are: {', '.join(sorted(recipes))}" if recipes else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _yaml_problem(error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "recipe"
    return Problem(where, f"not valid YAML: {error.problem or error}")


class _StrictLoader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Safe YAML in which a key written twice is an error and `2e-4` is a number."""


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key `{key}` is written twice", key_node.start_mark
            )
        seen.add(key)
    loader.flatten_mapping(node)
    return dict(yaml.SafeLoader.construct_mapping(loader, node, deep=True))


_StrictLoader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates
)
# YAML 1.1 reads `2e-4` as text for want of a dot; nobody who writes a learning rate means text.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class _LineIndex:
    """Finds the line of a key in the YAML text."""

    def __init__(self, text: str) -> None:
        self._root = yaml.compose(text, Loader=yaml.SafeLoader)

    def find(self, loc: tuple[str | int, ...]) -> int | None:
        """Line (from 1) of the deepest part of `loc` that stands in the file."""
        node, line = self._root, None
        for part in loc:
            if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                if part >= len(node.value):
                    break
                node = node.value[part]
                line = node.start_mark.line + 1
            elif isinstance(node, yaml.MappingNode):
                for key, value in node.value:
                    if key.value == str(part):
                        node, line = value, key.start_mark.line + 1
                        break
        return line
