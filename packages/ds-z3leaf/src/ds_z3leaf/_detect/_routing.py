"""Whether the source of a block sends its input to some of its experts, which tells a mixture from a stack of layers."""

from __future__ import annotations

import ast

from ds_z3leaf._detect._source import (
    Function,
    Source,
    assigned,
    attribute_of_self,
    depends,
    mentions,
    names_in,
)

_CHOICES = frozenset(
    "topk kthvalue argmax argmin max one_hot nonzero index_add index_add_ index_select index_copy index_copy_ multinomial "
    "argsort sort bincount histc gumbel_softmax unique scatter scatter_ scatter_add scatter_add_ gather".split()
)
_KEPT_APART = (ast.Tuple, ast.List, ast.Dict, ast.Set, ast.stmt)


def is_stack(source: Source, word: str) -> bool:
    """Whether ``self.word`` is called one after another, each on what the one before made."""
    for function in source.reached():
        members = _members(function, word)
        for statement in ast.walk(function):
            if not isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
                continue
            names, value = assigned(statement)
            calls = [part for part in ast.walk(value or statement) if _calls_member(part, word, members)]
            given = {name for call in calls for part in _arguments(call) for name in names_in(part)}
            if calls and (names & given or isinstance(statement, ast.AugAssign)):
                return True
    return False


def chooses(source: Source, router: str, words: tuple[str, ...]) -> bool:
    """Whether ``forward`` makes a choice from what ``self.router`` puts out and uses the experts by it.

    Args:
        source: of the block.
        router: the router's attribute.
        words: attributes that are, or hold, the experts.
    """
    functions = source.reached()
    if not any(_is_choice(part) for function in functions for part in ast.walk(function)):
        return False
    tainted = _from_router(functions, router)
    return bool(tainted) and any(_uses_by(function, word, tainted) for function in functions for word in words)


def routes(source: Source) -> bool:
    """Whether ``forward`` chooses at all, and picks from something by the choice."""
    return any(_is_choice(part) for function in source.reached() for part in ast.walk(function))


def _is_choice(part: ast.AST) -> bool:
    if not isinstance(part, ast.Call):
        return False
    name = part.func.attr if isinstance(part.func, ast.Attribute) else getattr(part.func, "id", "")
    return name in _CHOICES and (name != "max" or bool(part.args or part.keywords))


def _from_router(functions: list[Function], router: str) -> set[str]:
    """Names of variables that depend on the router's output."""
    callers = {function.name for function in functions if mentions(function, router)} - {"forward"}
    sources = {router, *callers}
    tainted: set[str] = set()
    for _ in range(3):
        for function in functions:
            for part in ast.walk(function):
                names, value = assigned(part)
                if value is not None and (depends(value, tainted) or any(mentions(value, word) for word in sources)):
                    tainted |= names - {"self"}
                if isinstance(part, ast.Call) and (method := attribute_of_self(part.func)):
                    tainted |= _handed_on(part, [other for other in functions if other.name == method], tainted)
    return tainted


def _handed_on(call: ast.Call, methods: list[Function], tainted: set[str]) -> set[str]:
    """Arguments of a method that take a value from the router."""
    taken: set[str] = set()
    for method in methods:
        names = [argument.arg for argument in method.args.args if argument.arg != "self"]
        taken |= {name for name, value in zip(names, call.args, strict=False) if depends(value, tainted)}
        taken |= {keyword.arg for keyword in call.keywords if keyword.arg and depends(keyword.value, tainted)}
    return taken


def _members(function: Function, word: str) -> set[str]:
    """Names that stand for ``self.word`` or one of its items: loop variables and assignments."""
    members: set[str] = set()
    for part in ast.walk(function):
        names, value = assigned(part)
        if value is None or not mentions(value, word):
            continue
        if isinstance(part, (ast.For, ast.comprehension)):
            members |= names
        elif _is_member(value, word, members):
            members |= names
    return members


def _is_member(part: ast.AST, word: str, members: set[str]) -> bool:
    while isinstance(part, ast.Subscript):
        part = part.value
    return attribute_of_self(part) == word or (isinstance(part, ast.Name) and part.id in members)


def _calls_member(part: ast.AST, word: str, members: set[str]) -> bool:
    return isinstance(part, ast.Call) and _is_member(part.func, word, members)


def _arguments(call: ast.AST) -> list[ast.AST]:
    return [*call.args, *call.keywords] if isinstance(call, ast.Call) else []


def _uses_by(function: Function, word: str, tainted: set[str]) -> bool:
    """Whether an expert is called, or its weights are used, with, for or under what comes from the router."""
    members = _members(function, word)
    holders = {id(child): node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    for part in ast.walk(function):
        if not (_calls_member(part, word, members) or attribute_of_self(part) == word):
            continue
        if isinstance(part, ast.Call) and depends(part, tainted - members):
            return True
        node: ast.AST | None = part
        while (node := holders.get(id(node))) is not None and not isinstance(node, _KEPT_APART):
            if isinstance(node, ast.expr) and depends(node, tainted - members):
                return True
        while node is not None:
            if isinstance(node, (ast.If, ast.While)) and depends(node.test, tainted):
                return True
            node = holders.get(id(node))
    return False
