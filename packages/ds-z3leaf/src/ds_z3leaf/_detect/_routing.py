"""Whether the source of a block sends its input to some of its experts, which tells a mixture from a stack of layers.

[Note: choice] A router's output is followed through assignments, loops and methods. Where it goes through topk, argmax
or a comparison, a choice is made of it. A mixture indexes its experts by the choice, calls them under a condition on
it, or gives them the rows that it selects. A head whose output meets that of some layers does none of this.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import partial

from ds_z3leaf._detect._source import (
    Function,
    Source,
    assigned,
    attribute_of_self,
    data_names,
    depends,
    mentions,
    names_in,
)

_CHOICES = frozenset(
    (
        "topk",
        "kthvalue",
        "argmax",
        "argmin",
        "max",
        "one_hot",
        "nonzero",
        "multinomial",
        "argsort",
        "sort",
        "bincount",
        "gumbel_softmax",
        "sample",
    )
)
Chosen = Callable[[ast.AST], bool]  # whether the value of an expression comes from a choice
_KEPT_APART = (ast.Tuple, ast.List, ast.Dict, ast.Set, ast.stmt)


def is_stack(source: Source, word: str) -> bool:
    """Whether the items of ``self.word`` are called one after another, each on what the one before made."""
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
    """Whether ``forward`` makes a choice of what ``self.router`` puts out, and uses the experts by it.

    Args:
        source: of the block.
        router: the router's attribute.
        words: attributes that are, or hold, the experts.
    """
    functions = source.reached()
    routed = _followed(functions, lambda part: mentions(part, router), set())

    def from_choice(part: ast.AST) -> bool:
        return any(
            _is_choice(inner) and (depends(inner, routed) or mentions(inner, router)) for inner in ast.walk(part)
        )

    choosing = {function.name for function in functions if from_choice(function)} - {"forward"}

    def starts(part: ast.AST) -> bool:
        return from_choice(part) or any(mentions(part, name) for name in choosing)

    chosen = _followed(functions, starts, set())

    def is_chosen(part: ast.AST) -> bool:
        return depends(part, chosen) or starts(part)

    return any(_picks(function, word, is_chosen, weights=True) for function in functions for word in words)


def picks_by_data(source: Source, words: tuple[str, ...]) -> bool:
    """Whether ``forward`` calls some of the experts by what it is given. ``self`` itself may be a list of them."""
    for function in source.reached():
        data = data_names(function)
        for word in words:
            given = data - _members(function, word)
            if _picks(function, word, partial(depends, tainted=given), weights=False):
                return True
    return False


def picks_by_argument(source: Source, words: tuple[str, ...]) -> bool:
    """Whether ``forward`` takes the item that an argument names, or gives items the rows that a choice selects.

    An item that a loop counts out, or that is called under a condition, may be one of a stack.
    """
    for function in source.reached():
        data = data_names(function)
        chosen = _followed([function], partial(_holds_choice, data=data), set())
        arguments = _named_choices(function) & data if function is source.forward else set()

        def is_chosen(part: ast.AST, chosen: set[str] = chosen, data: set[str] = data) -> bool:
            return depends(part, chosen) or _holds_choice(part, data)

        for word in words:
            members = _members(function, word)
            for part in ast.walk(function):
                if isinstance(part, ast.Subscript) and _is_member(part, word, members):
                    if isinstance(part.slice, ast.Name) and part.slice.id in arguments:
                        return True
                elif (_calls_member(part, word, members) and _selected(part, is_chosen)) or (
                    isinstance(part, ast.For) and _selects_in_turn(part, word, members, is_chosen)
                ):
                    return True
    return False


def _named_choices(function: Function) -> set[str]:
    """Arguments that may name an item: those that must be given, and are no int.

    An int counts steps or layers, and what has a default is mostly a step as well; both are the same on all ranks.
    """
    required = function.args.args[: len(function.args.args) - len(function.args.defaults)]
    return {
        argument.arg
        for argument in required
        if argument.annotation is None or "int" not in ast.unparse(argument.annotation)
    }


def _selects_in_turn(loop: ast.For, word: str, members: set[str], chosen: Chosen) -> bool:
    """Whether a loop selects rows, keeps them under a name, and calls an item with them."""
    rows: set[str] = set()
    for part in ast.walk(loop):
        if isinstance(part, ast.Assign) and isinstance(part.value, ast.Subscript) and chosen(part.value.slice):
            rows |= {target.id for target in part.targets if isinstance(target, ast.Name)}
    return any(
        isinstance(argument, ast.Name) and argument.id in rows
        for part in ast.walk(loop)
        if _calls_member(part, word, members)
        for argument in _arguments(part)
    )


def uses(source: Source, words: tuple[str, ...]) -> bool:
    """Whether ``forward`` says anything of these attributes."""
    return any(_mentions(function, word) for function in source.reached() for word in words)


def _holds_choice(part: ast.AST, data: set[str]) -> bool:
    return any(_is_choice(inner) and depends(inner, data) for inner in ast.walk(part))


def _is_choice(part: ast.AST) -> bool:
    if isinstance(part, ast.Compare):
        return not any(isinstance(operator, (ast.Is, ast.IsNot)) for operator in part.ops)
    if not isinstance(part, ast.Call):
        return False
    name = part.func.attr if isinstance(part.func, ast.Attribute) else getattr(part.func, "id", "")
    return name in _CHOICES and (name != "max" or bool(part.args or part.keywords))


def _followed(functions: list[Function], starts: Callable[[ast.AST], bool], followed: set[str]) -> set[str]:
    """Names of variables whose values come from where `starts` says."""
    for _ in range(3):  # through methods that call methods
        for function in functions:
            for part in ast.walk(function):
                names, value = assigned(part)
                if value is not None and (depends(value, followed) or starts(value)):
                    followed |= names - {"self"}
                if isinstance(part, ast.Call) and (method := attribute_of_self(part.func)):
                    followed |= _handed_on(part, [other for other in functions if other.name == method], followed)
    return followed


def _handed_on(call: ast.Call, methods: list[Function], followed: set[str]) -> set[str]:
    """Arguments of a method that take a followed value."""
    taken: set[str] = set()
    for method in methods:
        names = [argument.arg for argument in method.args.args if argument.arg != "self"]
        taken |= {name for name, value in zip(names, call.args, strict=False) if depends(value, followed)}
        taken |= {keyword.arg for keyword in call.keywords if keyword.arg and depends(keyword.value, followed)}
    return taken


def _members(function: Function, word: str) -> set[str]:
    """Names that stand for ``self.word`` or one of its items: loop variables and assignments."""
    members: set[str] = set()
    for part in ast.walk(function):
        names, value = assigned(part)
        if value is None or not _mentions(value, word):
            continue
        if isinstance(part, (ast.For, ast.comprehension)):
            members |= _item_names(part, word)
        elif _is_member(value, word, members):
            members |= names
    return members


def _item_names(loop: ast.For | ast.comprehension, word: str) -> set[str]:
    """The loop variable that is the item, also in ``enumerate(self.word)`` and ``zip(self.word, weights)``."""
    if isinstance(loop.target, ast.Tuple) and isinstance(loop.iter, ast.Call):
        targets, arguments = loop.target.elts, loop.iter.args
        name = getattr(loop.iter.func, "id", "")
        if name == "enumerate":
            return names_in(targets[-1])
        if name == "zip" and len(targets) == len(arguments):
            return {
                found
                for target, argument in zip(targets, arguments, strict=True)
                if _mentions(argument, word)
                for found in names_in(target)
            }
    return names_in(loop.target)


def _mentions(part: ast.AST, word: str) -> bool:
    return "self" in names_in(part) if word == "self" else mentions(part, word)


def _is_member(part: ast.AST, word: str, members: set[str]) -> bool:
    subscripted = isinstance(part, ast.Subscript)
    while isinstance(part, ast.Subscript):
        part = part.value
    if isinstance(part, ast.Name):
        return part.id in members or (subscripted and word == part.id == "self")
    return attribute_of_self(part) == word


def _calls_member(part: ast.AST, word: str, members: set[str]) -> bool:
    return isinstance(part, ast.Call) and _is_member(part.func, word, members)


def _arguments(call: ast.AST) -> list[ast.AST]:
    return [*call.args, *call.keywords] if isinstance(call, ast.Call) else []


def _picks(function: Function, word: str, chosen: Chosen, *, weights: bool) -> bool:
    """Whether experts are indexed by a choice, called under a condition on it, or given the rows it selects.

    `weights`: whether ``self.word`` may be a parameter, which is used without a call.
    """
    members = _members(function, word)
    holders = {id(child): node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    for part in ast.walk(function):
        called = _calls_member(part, word, members)
        if called and _selected(part, chosen):
            return True
        if isinstance(part, ast.Subscript) and _is_member(part, word, members) and chosen(part.slice):
            return True
        if called and _under(part, chosen, holders):
            return True
        if weights and attribute_of_self(part) == word and not isinstance(holders.get(id(part)), (ast.Call, ast.For)):
            node: ast.AST | None = part
            while (node := holders.get(id(node))) is not None and not isinstance(node, _KEPT_APART):
                if isinstance(node, (ast.BinOp, ast.Subscript)) and chosen(node):
                    return True
    return False


def _selected(call: ast.AST, chosen: Chosen) -> bool:
    """Whether a call is given rows that a choice selects."""
    for argument in _arguments(call):
        for part in ast.walk(argument):
            if isinstance(part, ast.Subscript) and chosen(part.slice):
                return True
            if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute) and part.func.attr == "index_select":
                return chosen(part)
    return False


def _under(part: ast.AST, chosen: Chosen, holders: dict[int, ast.AST]) -> bool:
    """Whether an expression stands under a condition on a choice, or in a loop over it."""
    inner, node = part, holders.get(id(part))
    while node is not None:
        if isinstance(node, (ast.If, ast.While, ast.IfExp)) and inner is not node.test and chosen(node.test):
            return True
        if isinstance(node, ast.For) and inner is not node.iter and chosen(node.iter):
            return True
        if isinstance(node, (ast.ListComp, ast.GeneratorExp)) and any(
            chosen(test) for generator in node.generators for test in (generator.iter, *generator.ifs)
        ):
            return True
        inner, node = node, holders.get(id(node))
    return False
