"""Public objects of the running Python's standard library, each with a description that reads well.

Modules written in Python are parsed, never imported: importing an arbitrary one can open a browser
(`antigravity`), print a poem (`this`) or start a GUI. Of modules written in C, a short list that is
safe to import is inspected.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import os
import re
import sys
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from posttrain.data.docstrings import describe, first_sentence

Kind = Literal["module", "class", "function", "method"]

_TOOLS_AND_TESTS = """
__main__ __phello__ antigravity encodings ensurepip idlelib lib2to3 nturl2path ntpath
popen_spawn_win32 pydoc_data test tests this tkinter turtledemo venv windows_events windows_utils
"""
_REMOVED_LATER = """
aifc asynchat asyncore audioop cgi cgitb chunk crypt distutils imghdr imp mailcap msilib nis nntplib
ossaudiodev pipes smtpd sndhdr spwd sunau telnetlib uu xdrlib
"""
_LEFT_OUT = frozenset((_TOOLS_AND_TESTS + _REMOVED_LATER).split())
"""What nobody imports, what runs only elsewhere, and what PEP 594 and PEP 632 removed."""

_WRITTEN_IN_C = """
builtins array binascii cmath collections decimal errno functools gc itertools math operator select
struct sys time unicodedata zlib
"""

_EXPORTED_AS = {"posixpath": "os.path", "genericpath": "os.path"}
"""Modules whose public name is not their file's."""


@dataclass(frozen=True)
class PythonObject:
    """One public module, class, function or method."""

    name: str
    """Dotted, as one writes it after importing the module: `textwrap.dedent`, `str.join`."""
    kind: Kind
    module: str
    description: str
    """One paragraph of about 5 to 60 words."""
    summary: str
    """The description's first sentence."""
    docstring: str
    """All of it, unindented."""
    signature: str | None = None
    """Parameters as `(text, width=70)`, without `self`, where they are known and short."""


@cache
def python_objects() -> tuple[PythonObject, ...]:
    """All objects, ordered by name; no two have the same summary.

    Takes about three seconds the first time. The same for every process of one Python build.
    """
    found: dict[str, PythonObject] = {}
    for item in (*_parsed(), *_inspected()):
        found.setdefault(item.name, item)
    seen: set[str] = set()
    unique = []
    # By length of name, so that the object closest to the top keeps a shared description.
    for item in sorted(found.values(), key=lambda item: (item.name.count("."), item.name)):
        key = item.summary.casefold()
        if key not in seen:
            seen.add(key)
            unique.append(item)
    return tuple(sorted(unique, key=lambda item: item.name))


def _make(
    name: str, kind: Kind, module: str, docstring: str | None, signature: str | None = None
) -> Iterator[PythonObject]:
    """The object, or nothing without a usable description."""
    description = describe(docstring or "")
    if description is not None:
        summary = first_sentence(description)
        whole = inspect.cleandoc(docstring or "")
        yield PythonObject(name, kind, module, description, summary, whole, signature)


@dataclass(frozen=True)
class _Module:
    name: str
    path: Path

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    def parse(self) -> ast.Module:
        return ast.parse(self.path.read_bytes())


def _parsed() -> Iterator[PythonObject]:
    """Objects of the modules that are written in Python, one syntax tree in memory at a time."""
    modules = list(_modules())
    exported = _exports(modules)
    for module in modules:
        tree = module.parse()
        is_public = not any(part.startswith("_") for part in module.name.split("."))
        if is_public:
            yield from _make(module.name, "module", module.name, ast.get_docstring(tree))
        declared = _declared_public(tree)
        for node in tree.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if node.name.startswith("_") or (declared is not None and node.name not in declared):
                continue
            home = exported.get((module.name, node.name)) or exported.get((module.name, "*"))
            if home or is_public:
                yield from _parsed_object(node, home or module.name)


def _modules() -> Iterator[_Module]:
    """Modules of the standard library that have Python source, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, names in os.walk(root):
        here = Path(folder)
        known = sys.stdlib_module_names if here == root else subfolders
        subfolders[:] = sorted(set(subfolders).intersection(known) - _LEFT_OUT)
        for name in sorted(names):
            path = here / name
            parts = path.relative_to(root).with_suffix("").parts
            if path.suffix != ".py" or parts[0].startswith("_") or _LEFT_OUT.intersection(parts):
                continue
            if parts[0] in sys.stdlib_module_names:
                dotted = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                yield _Module(_EXPORTED_AS.get(dotted, dotted), path)


def _exports(modules: list[_Module]) -> dict[tuple[str, str], str]:
    """What packages re-export: `asyncio.tasks`, `*` -> `asyncio`; `json.decoder`, `X` -> `json`."""
    exported: dict[tuple[str, str], str] = {}
    for package in modules:
        for node in package.parse().body if package.is_package else ():
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            source = f"{package.name}.{node.module}" if node.level == 1 else node.module
            if source.startswith(f"{package.name}."):
                for alias in node.names:
                    exported[source, alias.name] = package.name
    return exported


def _declared_public(tree: ast.Module) -> set[str] | None:
    """The names in `__all__`, or None where it is missing or computed."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            try:
                return set(ast.literal_eval(node.value))
            except ValueError:
                return None
    return None


def _parsed_object(
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, module: str
) -> Iterator[PythonObject]:
    name = f"{module}.{node.name}"
    if not isinstance(node, ast.ClassDef):
        yield from _make(name, "function", module, ast.get_docstring(node), _signature(node))
        return
    yield from _make(name, "class", module, ast.get_docstring(node))
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if child.name.startswith("_") or "property" in _decorators(child):
            continue
        full_name = f"{name}.{child.name}"
        signature = _signature(child, bound="staticmethod" not in _decorators(child))
        yield from _make(full_name, "method", module, ast.get_docstring(child), signature)


def _decorators(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    return {item.id for item in node.decorator_list if isinstance(item, ast.Name)}


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, bound: bool = False) -> str | None:
    """The parameters as written, without the first one of a bound method."""
    arguments = node.args
    if bound:
        if arguments.posonlyargs:
            arguments.posonlyargs = arguments.posonlyargs[1:]
        else:
            arguments.args = arguments.args[1:]
    return _shown(f"({ast.unparse(arguments)})")


def _inspected() -> Iterator[PythonObject]:
    """Objects of the built-in types and of modules written in C."""
    for module_name in _WRITTEN_IN_C.split():
        module = importlib.import_module(module_name)
        prefix = "" if module_name == "builtins" else f"{module_name}."
        if prefix and not hasattr(module, "__file__"):
            yield from _make(module_name, "module", module_name, module.__doc__)
        for name, value in sorted(vars(module).items()):
            if not name.startswith("_") and _is_own(name, value, module_name):
                yield from _inspected_object(f"{prefix}{name}", value, module_name)


def _is_own(name: str, value: object, module: str) -> bool:
    if isinstance(value, type):
        return value.__module__ in (module, f"_{module}") and value.__name__ == name
    is_function = isinstance(value, types.BuiltinFunctionType | types.FunctionType)
    return is_function and value.__module__ in (module, f"_{module}")


def _inspected_object(name: str, value: object, module: str) -> Iterator[PythonObject]:
    kind: Kind = "class" if isinstance(value, type) else "function"
    signature = None if kind == "class" else _inspected_signature(value)
    yield from _make(name, kind, module, inspect.getdoc(value), signature)
    if not isinstance(value, type) or issubclass(value, BaseException):
        return
    for child_name, child in sorted(vars(value).items()):
        if child_name.startswith("_") or not callable(child):
            continue
        yield from _make(
            f"{name}.{child_name}", "method", module, child.__doc__, _inspected_signature(child)
        )


def _inspected_signature(value: object) -> str | None:
    try:
        signature = inspect.signature(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    parameters = [
        item for item in signature.parameters.values() if item.name not in ("self", "type")
    ]
    # `/` is part of the calling convention, but answers to beginners read better without it.
    return _shown(str(signature.replace(parameters=parameters)).replace(", /", ""))


def _shown(signature: str) -> str | None:
    """A signature worth showing: short, and without private names in its defaults."""
    if len(signature) > 70 or re.search(r"(?<!\w)_\w|<|^\(self\b", signature):
        return None
    return signature


def partition(name: str) -> Literal["trained", "exam"]:
    """The side of an object: about a quarter are kept for the exam, by the hash of the name."""
    first = hashlib.sha256(f"exam\0{name}".encode()).digest()[0]
    return "exam" if first < 64 else "trained"
