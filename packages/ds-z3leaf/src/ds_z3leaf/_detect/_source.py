"""Read the source of a module's class: what its forward calls, under which conditions, and whether it routes.

Where there is no source, nothing is known, and every question is answered as if the module behaved as most do.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")
Function = ast.FunctionDef
_DEPTH = 3  # methods that call methods
_STATIC_ATTRIBUTES = frozenset({"dtype", "device", "ndim", "is_cuda", "requires_grad", "is_meta", "layout"})
_STATIC_CALLS = frozenset(
    {"isinstance", "hasattr", "callable", "type", "is_grad_enabled", "is_tensor", "is_compiling", "dim"}
)
_CONFIGURATION = frozenset({"self", "config", "cfg", "kwargs", "layer_idx", "layer_id"})


class Source:
    """The methods of one class.

    Attributes:
        forward: its ``forward``; None where there is no source.
    """

    def __init__(self, kind: type[nn.Module]) -> None:
        self._kind = kind
        self._parsed: dict[str, Function | None] = {}
        self.forward = self.method("forward")

    def method(self, name: str) -> Function | None:
        """A method by name, parsed; None if it is not of Python or its source is not there."""
        if name not in self._parsed:
            found = getattr(self._kind, name, None)
            own = inspect.isroutine(found) and found is not getattr(nn.Module, name, None)
            self._parsed[name] = _parse(found) if found is not None and own else None
        return self._parsed[name]

    def reached(self) -> list[Function]:
        """``forward`` and the methods that it calls, directly or through others."""
        functions: dict[str, Function] = {} if self.forward is None else {"forward": self.forward}
        for _ in range(_DEPTH):
            called = {word for function in functions.values() for word in _own_calls(function)} - set(functions)
            functions |= {word: method for word in sorted(called) if (method := self.method(word)) is not None}
        return list(functions.values())

    def all_methods(self) -> list[Function]:
        """Every method of the class and of those it derives from, up to torch's."""
        names = [
            name
            for base in self._kind.__mro__
            if not base.__module__.startswith("torch.")
            for name, value in vars(base).items()
            if inspect.isroutine(value) and name != "__init__"
        ]
        return [method for name in dict.fromkeys(names) if (method := self.method(name)) is not None]


class Sources:
    """The sources of the classes of one model, and the answers to what was asked of them.

    A model has hundreds of blocks of a few classes, and one answer takes tens of milliseconds.
    """

    def __init__(self) -> None:
        self._read: dict[type[nn.Module], Source] = {}
        self._answers: dict[tuple[object, ...], Any] = {}

    def of(self, module: nn.Module) -> Source:
        """The source of a module's class."""
        kind = type(module)
        if kind not in self._read:
            self._read[kind] = Source(kind)
        return self._read[kind]

    def ask(self, question: Callable[..., T], module: nn.Module, *arguments: Hashable) -> T:
        """What a function of a `Source` and these arguments returns for a module's class."""
        key = (question, id(type(module)), *arguments)
        if key not in self._answers:
            self._answers[key] = question(self.of(module), *arguments)
        answer: T = self._answers[key]
        return answer


def _parse(function: Callable[..., Any]) -> Function | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    found = next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)
    return None if found is None else _with_self(found)


def _with_self(function: Function) -> Function:
    """The method with its first argument called ``self``, as nearly all have it."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    first = arguments[0].arg if arguments else "self"
    if first != "self":
        arguments[0].arg = "self"
        for part in ast.walk(function):
            if isinstance(part, ast.Name) and part.id == first:
                part.id = "self"
    return function


def attribute_of_self(node: ast.AST) -> str | None:
    """``name`` for ``self.name``."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None


def mentions(node: ast.AST, word: str) -> bool:
    """Whether ``self.word`` is used in it."""
    return any(attribute_of_self(part) == word for part in ast.walk(node))


def names_in(node: ast.AST) -> set[str]:
    """The names of variables in it."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _own_calls(function: Function) -> set[str]:
    """Names of what is called, or handed on, as ``self.name``."""
    return {word for part in ast.walk(function) if (word := attribute_of_self(part)) is not None}


def only_raises(function: Function) -> bool:
    """Whether a method does nothing but raise."""
    body = [
        statement
        for statement in function.body
        if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
    ]
    return len(body) == 1 and isinstance(body[0], ast.Raise)


def assigned(statement: ast.AST) -> tuple[set[str], ast.AST | None]:
    """Which names a statement or a comprehension binds, and to what."""
    if isinstance(statement, ast.Assign):
        return {name for target in statement.targets for name in names_in(target)}, statement.value
    if isinstance(statement, (ast.AugAssign, ast.AnnAssign, ast.NamedExpr)):
        return names_in(statement.target), statement.value
    if isinstance(statement, (ast.For, ast.comprehension)):
        return names_in(statement.target), statement.iter
    return set(), None


def data_names(function: Function) -> set[str]:
    """Names in a method that depend on its tensors, and so may differ between ranks.

    Switches (bool arguments) and configuration do not; names that are bound to attributes of ``self`` do not.
    """
    tainted = _data_arguments(function)
    for _ in range(2):  # a loop may use below what it binds above
        for statement in ast.walk(function):
            names, value = assigned(statement)
            if value is not None and depends(value, tainted):
                tainted |= names - {"self"}
    return tainted


def _data_arguments(function: Function) -> set[str]:
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults]
    data: set[str] = set()
    for argument, default in [
        *zip(positional, defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]:
        switch = isinstance(default, ast.Constant) and isinstance(default.value, (bool, str))
        annotation = ast.unparse(argument.annotation) if argument.annotation else ""
        if not switch and "bool" not in annotation and argument.arg not in _CONFIGURATION:
            data.add(argument.arg)
    if arguments.vararg:
        data.add(arguments.vararg.arg)
    return data


def depends(expression: ast.AST, tainted: set[str]) -> bool:
    """Whether the value of an expression depends on one of these names."""
    if isinstance(expression, ast.Name):
        return expression.id in tainted
    if isinstance(expression, ast.Attribute) and expression.attr in _STATIC_ATTRIBUTES:
        return False
    if isinstance(expression, ast.Call):
        called = expression.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if name in _STATIC_CALLS:
            return False
    return any(depends(child, tainted) for child in ast.iter_child_nodes(expression))
