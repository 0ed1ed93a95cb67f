"""Sight: whether all that a chat template does with a text is done by the text's own methods. A template in, yes or no out.

Jinja and Python's own C code make plain strings of any text that they join, format or look up; what a template then asks of such a
string, no watched text hears of (see pipeline.frame). That is harmless where the string is put out at once. A template in which it
may not be is out of sight, and so is one with a construction that is not named here.
"""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment
from jinja2 import TemplateSyntaxError
from jinja2 import nodes
from jinja2.ext import loopcontrols

_PLAIN = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign, nodes.Break, nodes.Continue,
    nodes.Name, nodes.NSRef, nodes.Const, nodes.Tuple, nodes.List, nodes.Dict, nodes.Keyword, nodes.CondExpr,
    nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.Add, nodes.Sub,
    nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Compare,
)  # fmt: skip
"""What a watched text notices, or what has nothing to do with texts. Not {% macro %}, {% call %}, {% filter %} and {% set %} with a
body, which join what is put out in them, nor {% include %} and its like."""
_FILTERS = frozenset(
    {
        "trim", "length", "count", "list", "first", "last", "upper", "lower", "capitalize", "replace", "string", "default", "d",
        "items", "select", "reject", "selectattr", "rejectattr",
    }
)  # fmt: skip
"""Those that call methods of the text itself, or hand it on."""
_JOINING_FILTERS = frozenset({"join", "tojson"})
_FUNCTIONS = frozenset({"raise_exception", "namespace", "range", "dict"})
"""Those that may be given texts: they do not make others of them."""


def in_sight(template: str) -> bool:
    try:
        tree = Environment(extensions=[loopcontrols]).parse(template)
        own_fields = _own_fields(tree)
        return _seen(tree) and all(_looks_up_in_sight(compare, own_fields) for compare in tree.find_all(nodes.Compare))
    except (TemplateSyntaxError, RecursionError):
        return False


def _seen(node: nodes.Node, *, put_out: bool = False) -> bool:
    """Of a node and all below it. `put_out`: nothing but the output gets what it comes to."""
    match node:
        case nodes.Concat():
            seen = put_out
        case nodes.Filter():
            constant = _constant(node.args, node.kwargs, node.dyn_args, node.dyn_kwargs) and not _names_in(node.args)
            seen = constant and (node.name in _FILTERS or (put_out and node.name in _JOINING_FILTERS))
        case nodes.Test():
            seen = node.name != "in"
        case nodes.Mod():  # of numbers; of a text it is formatting
            seen = isinstance(node.right, nodes.Const) and isinstance(node.right.value, int)
        case nodes.Pair():
            seen = isinstance(node.key, nodes.Const)
        case nodes.Call():
            seen = _calls_in_sight(node)
        case _:
            seen = isinstance(node, _PLAIN)
    out = isinstance(node, nodes.Output) or (put_out and isinstance(node, nodes.Add | nodes.Concat))
    return seen and all(_seen(child, put_out=out) for child in node.iter_child_nodes())


def _calls_in_sight(call: nodes.Call) -> bool:
    """Known functions, and methods that are given no text: `''.join(texts)` would not be noticed."""
    constant = _constant(call.args, call.kwargs, call.dyn_args, call.dyn_kwargs)
    if isinstance(call.node, nodes.Name):
        return call.node.name in _FUNCTIONS or (call.node.name == "strftime_now" and constant)
    return isinstance(call.node, nodes.Getattr) and constant


def _looks_up_in_sight(compare: nodes.Compare, own_fields: set[str]) -> bool:
    """A constant in anything, anything in a list that is spelt out, or a message's other fields in anything.

    `text in 'some words'` would not be noticed.
    """
    if not any(operand.op in ("in", "notin") for operand in compare.ops):
        return True
    what = compare.expr
    if isinstance(what, nodes.Getattr):
        other = what.attr not in own_fields
    elif isinstance(what, nodes.Getitem) and isinstance(what.arg, nodes.Const):
        other = isinstance(what.arg.value, str) and what.arg.value not in own_fields
    else:
        other = False
    spelt_out = isinstance(compare.ops[0].expr, nodes.List | nodes.Tuple)
    return len(compare.ops) == 1 and (other or spelt_out or isinstance(what, nodes.Const))


def _own_fields(tree: nodes.Template) -> set[str]:
    """Names under which a text may be found: a message's own, and those that the template makes itself."""
    made = {keyword.key for keyword in tree.find_all(nodes.Keyword)} | {field.attr for field in tree.find_all(nodes.NSRef)}
    keys = {pair.key.value for pair in tree.find_all(nodes.Pair) if isinstance(pair.key, nodes.Const)}
    return {"content", *made, *map(str, keys)}


def _constant(args: list[nodes.Expr], kwargs: Sequence[nodes.Keyword | nodes.Pair], *dynamic: nodes.Expr | None) -> bool:
    return not any(dynamic) and all(isinstance(arg, nodes.Const) for arg in (*args, *(keyword.value for keyword in kwargs)))


def _names_in(args: list[nodes.Expr]) -> bool:
    """Whether a filter such as select is asked to look its items up in something."""
    return any(isinstance(arg, nodes.Const) and arg.value == "in" for arg in args)
