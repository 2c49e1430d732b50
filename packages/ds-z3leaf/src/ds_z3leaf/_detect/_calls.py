"""Whether a module is called by the one around it, and whether on every rank."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from torch import nn

from ds_z3leaf._detect._source import (
    Function,
    Source,
    attribute_of_self,
    data_names,
    depends,
    mentions,
    only_raises,
)
from ds_z3leaf._detect._tree import Node, class_of, is_container, wrapped

_SHOWN = 60  # characters of a condition in a message
_DEPTH = 3
Paths = frozenset[bool]  # on which ways through the code the module was called; empty where there is no way
_NONE: Paths = frozenset()


def cannot_be_called(module: nn.Module, source: Source) -> str | None:
    """Why calling a module can only fail; None if it can work."""
    if type(module).forward is nn.Module.forward:
        kind = class_of(module).__name__
        return f"a {kind} is never called itself" if is_container(module) else f"{kind} has no forward"
    if source.forward is not None and only_raises(source.forward):
        return "its forward only raises"
    return None


def other_use(source: Source, word: str, listed: bool) -> str | None:
    """How a class uses ``self.word`` if it never calls it, such as "calls .map()"; None if it does, or for no use.

    Args:
        source: of the module that holds it.
        word: the attribute.
        listed: whether the module is an item of that attribute, so that subscripts call it.
    """
    uses: list[str] = []
    for function in source.all_methods():
        holders = {id(child): node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
        for part in ast.walk(function):
            if attribute_of_self(part) != word or isinstance(getattr(part, "ctx", None), ast.Store):
                continue
            holder = holders.get(id(part))
            if isinstance(holder, ast.Attribute):
                if holder.attr == "__call__":
                    return None
                if _goes_around(holder.attr) and _is_called(holder, holders):
                    uses.append(f"calls .{holder.attr}()")
            elif isinstance(holder, ast.Subscript) and holder.value is part and not listed:
                uses.append("takes items of it")
            elif not isinstance(holder, ast.Compare):
                return None  # called, or handed to something that may call it
    return " and ".join(dict.fromkeys(uses)) or None


def _goes_around(method: str) -> bool:
    return method == "forward" or not hasattr(nn.Module, method)


def _is_called(part: ast.AST, holders: dict[int, ast.AST]) -> bool:
    """Whether an attribute, or an item or attribute of it, is called."""
    holder = holders.get(id(part))
    while isinstance(holder, (ast.Attribute, ast.Subscript)) and holder.value is part:
        part, holder = holder, holders.get(id(holder))
    return isinstance(holder, ast.Call) and holder.func is part


def condition_of_call(source: Source, word: str) -> str | None:
    """The condition that decides whether ``forward`` calls ``self.word``, if it depends on what the rank was given.

    Conditions on attributes of the module, switches and types are the same on all ranks and do not count.
    """
    if source.forward is None:
        return None
    walker = _Walker(source, word)
    called = walker.function(source.forward, _DEPTH)
    return walker.reason if True in called and False in called and walker.reason else None


@dataclass(frozen=True)
class _Ways:
    """The ways through some statements: those that fall through, leave the loop round, and leave the method."""

    fall: Paths
    jump: Paths = _NONE
    leave: Paths = _NONE

    def __or__(self, other: _Ways) -> _Ways:
        return _Ways(self.fall | other.fall, self.jump | other.jump, self.leave | other.leave)

    def call(self) -> bool:
        """Whether any of the ways has called the module."""
        return True in self.fall | self.jump | self.leave


@dataclass
class _Walker:
    """Follows a method's statements and notes on which ways ``self.word`` was called before it returned."""

    source: Source
    word: str
    reason: str | None = None
    data: set[str] = field(default_factory=set)
    depth: int = 0

    def function(self, function: Function, depth: int) -> Paths:
        outer = self.data, self.depth
        self.data, self.depth = data_names(function), depth
        ways = self.block(function.body, frozenset({False}))
        self.data, self.depth = outer
        return ways.fall | ways.leave

    def block(self, statements: list[ast.stmt], start: Paths) -> _Ways:
        ways = _Ways(start)
        for statement in statements:
            after = self.statement(statement, ways.fall)
            ways = _Ways(after.fall, ways.jump | after.jump, ways.leave | after.leave)
        return ways

    def statement(self, statement: ast.stmt, start: Paths) -> _Ways:
        if not start or isinstance(statement, ast.Raise):
            return _Ways(_NONE)
        if isinstance(statement, ast.If):
            start = self.expression(statement.test, start)
            return self.branch(statement.test, self.block(statement.body, start), self.block(statement.orelse, start))
        if isinstance(statement, (ast.For, ast.While)):
            return self.loop(statement, start)
        if isinstance(statement, ast.With):
            for item in statement.items:
                start = self.expression(item.context_expr, start)
            return self.block(statement.body, start)
        if isinstance(statement, ast.Try):
            return self.block([*statement.body, *statement.orelse, *statement.finalbody], start)
        if isinstance(statement, ast.FunctionDef):  # what checkpointing is given
            return _Ways(frozenset({True}) if mentions(statement, self.word) else start)
        if isinstance(statement, (ast.Break, ast.Continue)):
            return _Ways(_NONE, jump=start)
        after = self.expression(statement, start)
        return _Ways(_NONE, leave=after) if isinstance(statement, ast.Return) else _Ways(after)

    def branch(self, test: ast.expr, then: _Ways, other: _Ways) -> _Ways:
        if depends(test, self.data):
            if then != other:
                self.note(test)
            return then | other
        # The test comes out the same on all ranks: the way that leads to the call is the one of interest.
        if then.call() != other.call():
            return then if then.call() else other
        return then | other if then.call() else _Ways(then.fall | other.fall, then.jump | other.jump)

    def loop(self, statement: ast.For | ast.While, start: Paths) -> _Ways:
        head = statement.iter if isinstance(statement, ast.For) else statement.test
        start = self.expression(head, start)
        ways = self.block(statement.body, start)
        after = ways.fall | ways.jump
        if depends(head, self.data):
            if True in after - start:
                self.note(head)
            after |= start
        return _Ways(after, leave=ways.leave)

    def expression(self, node: ast.AST, start: Paths) -> Paths:
        """The ways after an expression or a simple statement."""
        if True not in start or False in start:
            certain, possible = self.calls(node)
            if certain:
                return frozenset({True})
            if possible:
                return start | {True}
        return start

    def calls(self, node: ast.AST) -> tuple[bool, bool]:
        """Whether evaluating this calls the module for certain, and whether it may."""
        if attribute_of_self(node) == self.word:
            return True, True
        if isinstance(node, ast.Call):
            method = attribute_of_self(node.func)
            function = self.source.method(method) if method and self.depth > 0 else None
            if function is not None and method != self.word:
                inside = self.function(function, self.depth - 1)
                if True in inside:
                    return (False not in inside), True
        if isinstance(node, ast.Attribute) and attribute_of_self(node.value) == self.word and node.attr != "__call__":
            # Another attribute of the module; a method of it is no call.
            return False, False
        if isinstance(node, ast.Compare) and all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in node.ops):
            return False, False
        if isinstance(node, ast.IfExp):
            return self.either(node)
        if isinstance(node, ast.BoolOp):
            first = self.calls(node.values[0])
            rest = any(self.calls(value)[1] for value in node.values[1:])
            dynamic = rest and depends(node.values[0], self.data)
            if dynamic:
                self.note(node.values[0])
            return first[0] or (rest and not dynamic), first[1] or rest
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            return self.comprehension(node)
        parts = [self.calls(child) for child in ast.iter_child_nodes(node)]
        return any(certain for certain, _ in parts), any(possible for _, possible in parts)

    def either(self, node: ast.IfExp) -> tuple[bool, bool]:
        test, body, other = self.calls(node.test), self.calls(node.body), self.calls(node.orelse)
        possible = test[1] or body[1] or other[1]
        if depends(node.test, self.data):
            certain = body[0] and other[0]
            if possible and not certain:
                self.note(node.test)
        else:
            certain = body[0] or other[0]
        return test[0] or certain, possible

    def comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> tuple[bool, bool]:
        parts = [self.calls(child) for child in ast.iter_child_nodes(node) if not isinstance(child, ast.comprehension)]
        certain, possible = any(part[0] for part in parts), any(part[1] for part in parts)
        for generator in node.generators:
            for test in (generator.iter, *generator.ifs):
                if possible and depends(test, self.data):
                    self.note(test)
                    certain = False
            heads = self.calls(generator.iter)
            certain, possible = certain or heads[0], possible or heads[1]
        return certain, possible

    def note(self, condition: ast.AST) -> None:
        """Keep the condition for the message; the last one is the innermost that matters."""
        text = " ".join(ast.unparse(condition).split())
        self.reason = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def holder_of(node: Node) -> tuple[Node, str, bool] | None:
    """The module around a node whose class has source to read, the attribute, and whether the node is an item of it."""
    listed = False
    word = node.word
    parent = node.parent
    while parent is not None:
        if wrapped(parent.module) is not None:
            pass
        elif is_container(parent.module) and type(parent.module).__module__.startswith("torch.nn."):
            listed = True
        else:
            return parent, word, listed
        word, parent = parent.word, parent.parent
    return None
