"""Editing a recipe's YAML where it stands: comments, order and style of all else stay.

Positions come from PyYAML's nodes. Every edit is checked: the text that comes out has to hold the
values that were asked for, and nothing else may have changed. Where that cannot be had, as with
anchors, the whole recipe is written anew, without its comments.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from posttrain.errors import UsageError
from posttrain.recipe.load import apply_override
from posttrain.repair.remedy import Change, Edit, Insertion, Path

_WIDTH = 100


def edit_text(text: str, edits: Sequence[Edit]) -> str:
    """The text with all edits, each with its comment above it.

    Args:
        text: a recipe in YAML.
        edits: in order; each one's position is that after the ones before it.

    Raises:
        ValueError: a path leads through something that has no keys.
    """
    for edit in edits:
        wanted = edit_data(read_data(text), edit)
        try:
            edited = _Text(text).apply(edit)
            if read_data(edited) != wanted:
                raise ValueError("the text holds something else")
        except (ValueError, UsageError, yaml.YAMLError):
            edited = _anew(text, wanted, edit)
        text = edited
    return text


def read_data(text: str) -> dict[str, Any]:
    """A recipe's text as plain data, read as a recipe is read.

    Raises:
        UsageError: it is not YAML.
        ValueError: it is no mapping.
    """
    read: dict[str, Any] = {}
    apply_override(read, f"name={text}")
    if not isinstance(read["name"], dict):
        raise ValueError("a recipe is a mapping of keys to values")
    return dict(_unshared(read["name"]))


def _unshared(value: Any) -> Any:
    """The same, with what an anchor stands for written out wherever it is used."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def edit_data(data: Mapping[str, Any], edit: Edit) -> dict[str, Any]:
    """The same as plain data, which stays as it is.

    Raises:
        ValueError: a path leads through something that has no keys.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(data))
    if isinstance(edit, Insertion):
        changed["stages"].insert(edit.position, {edit.stage: edit.body})
        return changed
    target: Any = changed
    for part, after in zip(edit.path, edit.path[1:], strict=False):
        target = _inside(target, part, after)
    if not isinstance(target, dict | list):
        raise ValueError(f"{edit.path}: nothing there has keys")
    if isinstance(target, dict) and edit.in_place_of is not None:
        target.pop(edit.in_place_of, None)
    target[edit.path[-1]] = edit.value
    return changed


def differences(before: Any, after: Any, why: str, path: Path = ()) -> list[Change]:
    """The changes that make one recipe's data of another's; of lists of one length only."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: list[Change] = []
        for key, value in after.items():
            if key not in before:
                found.append(Change((*path, key), value, why))
            elif before[key] != value:
                found += differences(before[key], value, why, (*path, key))
        return found
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            change
            for position, (one, other) in enumerate(zip(before, after, strict=True))
            if one != other
            for change in differences(one, other, why, (*path, position))
        ]
    return [Change(path, after, why)]


def _inside(target: Any, part: str | int, after: str | int) -> Any:
    """One level down; a stage that is a bare word, or a key without a value, gets keys."""
    if isinstance(target, list) and isinstance(target[int(part)], str):
        target[int(part)] = {target[int(part)]: {}}
    if isinstance(target, dict) and target.get(str(part)) is None and isinstance(after, str):
        target[str(part)] = {}
    if not isinstance(target, dict | list):
        raise ValueError(f"`{part}`: nothing there has keys")
    return target[part]  # type: ignore[index]  # a list is asked for numbers alone


class _Text:
    """YAML text and its nodes, for one edit."""

    def __init__(self, text: str) -> None:
        self._text = text if text.endswith("\n") else text + "\n"
        self._root = yaml.compose(self._text, Loader=yaml.SafeLoader)

    def apply(self, edit: Edit) -> str:
        if isinstance(edit, Insertion):
            return self._insert(edit)
        node, path = self._root, list(edit.path)
        while len(path) > 1:
            value = self._child(node, path[0])[1]
            if value is None or not isinstance(value, yaml.CollectionNode):
                break
            node, path = value, path[1:]
        if isinstance(node, yaml.SequenceNode):
            return self._into_word(node.value[int(path[0])], path[1:], edit)
        return self._set(node, path, edit)

    # A key of a mapping

    def _set(self, node: yaml.MappingNode, path: list[str | int], edit: Change) -> str:
        """Set the first of `path` in a mapping; what remains of it becomes keys of the value."""
        value = _nested(path[1:], edit.value)
        key, old = self._child(node, path[0])
        if key is None and edit.in_place_of is not None:
            key, old = self._child(node, edit.in_place_of)
        if key is None:
            return self._add(node, str(path[0]), value, _reason(edit))
        start, end = key.start_mark.index, max(_end(old), key.end_mark.index)
        if self._text[key.end_mark.index : key.end_mark.index + 1] == ":":
            end = max(end, key.end_mark.index + 1)
        return self._replaced(start, end, f"{path[0]}: {_flow(value)}", _reason(edit))

    def _add(self, node: yaml.MappingNode, key: str, value: Any, why: str) -> str:
        entry = f"{key}: {_flow(value)}"
        if node.flow_style:
            if not node.value:
                start, end = node.start_mark.index, node.end_mark.index
                return self._replaced(start, end, f"{{{entry}}}", why)
            last = max(_end(node.value[-1][1]), node.value[-1][0].end_mark.index)
            return self._replaced(last, last, f", {entry}", why)
        indent = " " * node.value[0][0].start_mark.column
        at = self._line_after(_end(node))
        return self._text[:at] + _comment(why, indent) + f"{indent}{entry}\n" + self._text[at:]

    # A stage

    def _into_word(self, node: yaml.Node, path: list[str | int], edit: Change) -> str:
        """`- merge` becomes `- merge: {...}`."""
        word, *rest = path
        if not isinstance(node, yaml.ScalarNode) or node.value != word:
            raise ValueError(f"`{word}` is not there")
        start, end = node.start_mark.index, node.end_mark.index
        return self._replaced(
            start, end, f"{word}: {_flow(_nested(rest, edit.value))}", _reason(edit)
        )

    def _insert(self, edit: Insertion) -> str:
        _, stages = self._child(self._root, "stages")
        if not isinstance(stages, yaml.SequenceNode) or not stages.value:
            raise ValueError("there are no stages")
        entry = f"{edit.stage}: {_flow(edit.body)}"
        if stages.flow_style:
            if edit.position == 0:
                at = stages.value[0].start_mark.index
                return self._replaced(at, at, f"{{{entry}}}, ", edit.why)
            at = _end(stages.value[edit.position - 1])
            return self._replaced(at, at, f", {{{entry}}}", edit.why)
        first = stages.value[0].start_mark.index
        dash = self._text.rindex("-", 0, first)
        indent = " " * (dash - self._text.rindex("\n", 0, dash) - 1)
        if edit.position == 0:
            at = self._text.rindex("\n", 0, dash) + 1
        else:
            at = self._line_after(_end(stages.value[edit.position - 1]))
        lines = _comment(edit.why, indent) + f"{indent}- {entry}\n"
        return self._text[:at] + lines + self._text[at:]

    # How it is done

    def _child(self, node: yaml.Node, part: str | int) -> tuple[yaml.Node | None, yaml.Node | None]:
        """Key and value of a mapping, or an item of a sequence twice."""
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            return node.value[part], node.value[part]
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    return key, value
        return None, None

    def _replaced(self, start: int, end: int, new: str, why: str) -> str:
        """Put text in place, and the comment on a line of its own above it."""
        line = self._text.rfind("\n", 0, start) + 1
        content = self._text[line:start] or self._text[line : self._line_after(line)]
        indent = content[: len(content) - len(content.lstrip(" "))]
        comment = _comment(why, indent)
        return self._text[:line] + comment + self._text[line:start] + new + self._text[end:]

    def _line_after(self, index: int) -> int:
        """Where the line after the one at `index` begins; right there where one has just ended."""
        if index > 0 and self._text[index - 1] == "\n":
            return index
        return self._text.index("\n", index) + 1


def _end(node: yaml.Node | None) -> int:
    """Where a node's own text ends; PyYAML ends a block where the next thing begins."""
    if node is None:
        return 0
    if isinstance(node, yaml.MappingNode) and not node.flow_style and node.value:
        key, value = node.value[-1]
        return max(_end(value), int(key.end_mark.index) + 1)
    if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        return max(_end(item) for item in node.value[-1:])
    return int(node.end_mark.index)


def _nested(path: Sequence[str | int], value: Any) -> Any:
    for part in reversed(path):
        value = {str(part): value}
    return value


def _reason(edit: Change) -> str:
    """The comment, which says of which key it is."""
    return f"{edit.path[-1]} {edit.why}" if edit.why else ""


def _flow(value: Any) -> str:
    """A value on one line."""
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True
    )
    return str(text).removesuffix("\n").removesuffix("\n...").strip()


def _comment(why: str, indent: str) -> str:
    """Comment lines no wider than a page."""
    import textwrap

    if not why:
        return ""
    lead = f"{indent}# "
    lines = textwrap.wrap(
        " ".join(why.split()),
        max(_WIDTH, len(lead) + 40),
        initial_indent=lead,
        subsequent_indent=lead,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "".join(f"{line}\n" for line in lines)


def _anew(text: str, data: dict[str, Any], edit: Edit) -> str:
    """All of it, with the comments at its head kept and the reason among them."""
    head: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        head.append(line)
    reason = _reason(edit) if isinstance(edit, Change) else edit.why
    body = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=_WIDTH)
    return "\n".join([*head, _comment(reason, "").rstrip("\n"), str(body)])
