"""Whether a module's forward calls a child on every path, read from its source."""

from __future__ import annotations

import ast

from torch import nn

from ds_z3leaf._detect._source import Source


def always_calls(module: nn.Module, child: str) -> bool:
    """Whether each run of ``module.forward`` calls ``self.<child>(...)``, whatever the data are.

    Only what stands in the open counts: not under a condition, in a loop, in a function of its own, nor behind a return
    that is under a condition. Without source the answer is no.
    """
    function = Source(type(module)).forward
    if function is None or not function.args.args:
        return False
    return _runs(function.body, function.args.args[0].arg, child) is True


def _runs(body: list[ast.stmt], me: str, child: str) -> bool | None:
    """True if the statements call it, None if they may return before, False if they come to their end without."""
    for statement in body:
        if isinstance(statement, (ast.With, ast.AsyncWith)):
            if any(_calls(item.context_expr, me, child) for item in statement.items):
                return True
            inner = _runs(statement.body, me, child)
            if inner is not False:
                return inner
        elif isinstance(statement, (ast.If, ast.For, ast.While, ast.Try, ast.FunctionDef, ast.ClassDef, ast.Match)):
            head = getattr(statement, "test", None) or getattr(statement, "iter", None)
            if head is not None and _calls(head, me, child):
                return True
            nested = not isinstance(statement, (ast.FunctionDef, ast.ClassDef))
            if nested and any(isinstance(part, ast.Return) for part in ast.walk(statement)):
                return None
        elif _calls(statement, me, child):
            return True
        elif isinstance(statement, ast.Return):
            return None
    return False


def _calls(node: ast.AST, me: str, child: str) -> bool:
    """Whether evaluating this calls the child for certain."""
    if isinstance(node, ast.Call):
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr == child:
            return (isinstance(called.value, ast.Name) and called.value.id == me) or _calls(called.value, me, child)
    if isinstance(node, ast.IfExp):
        return _calls(node.test, me, child)
    if isinstance(node, ast.BoolOp):
        return _calls(node.values[0], me, child)
    if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        return False
    return any(_calls(part, me, child) for part in ast.iter_child_nodes(node))
