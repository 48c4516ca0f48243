"""Tests that every public function of the package has the types of its parameters and result."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "avb_tf"
FILES = sorted(PACKAGE.rglob("*.py"))


def public(body):
    """Yields the public functions in the body of a module or of a public class."""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            if not node.name.startswith("_") or node.name in ("__init__", "__call__"):
                yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node.body)


def untyped(function):
    """Yields what lacks a type in the signature of a function."""
    a = function.args
    for parameter in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]:
        if parameter and parameter.arg not in ("self", "cls") and parameter.annotation is None:
            yield parameter.arg
    if function.returns is None and function.name != "__init__":
        yield "the result"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_public_functions_have_types(file):
    missing = {
        f"{function.name}, line {function.lineno}": names
        for function in public(ast.parse(file.read_text()).body)
        if (names := list(untyped(function)))
    }
    assert not missing
