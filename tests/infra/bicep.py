"""Bicep files as data: what they declare, by a real parser (tree-sitter's grammar). Understands what infra/ uses and refuses the rest."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

import tree_sitter
import tree_sitter_bicep
from tree_sitter import Node

_DECLARATIONS = {
    "parameter_declaration": "param",
    "variable_declaration": "var",
    "resource_declaration": "resource",
    "module_declaration": "module",
    "output_declaration": "output",
}
_OTHERS = {"metadata_declaration", "target_scope_assignment", "decorators", "comment", "using_statement"}
_LOOPS = ("variable_declaration", "resource_declaration", "module_declaration", "output_declaration")
"""What may be a loop as a whole."""
_ESCAPES = {"\\'": "'", "\\\\": "\\", "\\n": "\n", "\\r": "\r", "\\t": "\t", "\\$": "$"}


class BicepError(Exception):
    """A template that Bicep's compiler would refuse, or that says more than this reader understands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Declaration:
    """One param, var, resource, module or output."""

    kind: str
    name: str
    node: Node
    body: Node | None
    """What stands behind the equals sign."""
    type: str = ""
    """Of a param or output: its type. Of a resource: its type and version. Of a module: its path."""
    existing: bool = False
    decorators: dict[str, Node] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """One file."""

    path: Path
    root: Node
    scope: str
    declarations: dict[tuple[str, str], Declaration]

    def of(self, *kinds: str) -> list[Declaration]:
        return [one for (kind, _), one in self.declarations.items() if kind in kinds]

    def symbol(self, name: str) -> Declaration | None:
        """What an expression means by a name; outputs cannot be named."""
        for kind in ("param", "var", "resource", "module"):
            if (kind, name) in self.declarations:
                return self.declarations[kind, name]
        return None


@functools.cache
def _parser() -> tree_sitter.Parser:
    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_bicep.language()))


@functools.cache
def read(path: Path) -> Template:
    """Of a file that will not change. Raises BicepError, naming the line."""
    text = path.read_text()
    if path.suffix == ".bicepparam":
        # The grammar knows parameter files, but not `param name = value`, which has the shape of a variable.
        text = re.sub(r"^param (?=\w+ =)", "var ", text, flags=re.MULTILINE)
    root = _parser().parse(text.encode()).root_node
    for node in walk(root):
        if node.type == "ERROR" or node.is_missing:
            raise BicepError(f"{path.name}:{node.start_point[0] + 1}: {text_of(node)[:60]!r} is not Bicep")
        if node.type == "for_statement" and not _may_loop(node):
            raise BicepError(
                f"{where(path, node)}: Bicep takes no loop here (BCP138): only as the whole value of a variable, output, resource or "
                "module, or of a property of a resource or module"
            )
    declarations: dict[tuple[str, str], Declaration] = {}
    decorators: dict[str, Node] = {}
    scope = "resourceGroup"
    for node in root.named_children:
        if node.type == "decorators":
            decorators = dict(_decorator(one) for one in node.named_children)
            continue
        if node.type == "target_scope_assignment":
            scope = literal(node.named_children[0])
        elif node.type in _DECLARATIONS:
            one = _declaration(node, decorators)
            if one.kind != "output" and any(kind != "output" and name == one.name for kind, name in declarations):
                raise BicepError(f"{where(path, node)}: {one.name} is declared twice")
            declarations[one.kind, one.name] = one
        elif node.type not in _OTHERS:
            raise BicepError(f"{where(path, node)}: this reader does not know {node.type}")
        if node.type != "comment":
            decorators = {}
    return Template(path=path, root=root, scope=scope, declarations=declarations)


def using(template: Template) -> Path:
    """The template that a parameter file is for."""
    statements = [node for node in template.root.named_children if node.type == "using_statement"]
    if len(statements) != 1:
        raise BicepError(f"{template.path.name} has {len(statements)} using statements, expected one")
    return (template.path.parent / literal(statements[0].named_children[0])).resolve()


def walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from walk(child)


def text_of(node: Node) -> str:
    return (node.text or b"").decode()


def where(path: Path, node: Node) -> str:
    return f"{path.name}:{node.start_point[0] + 1}"


def literal(node: Node) -> str:
    """A string without interpolation."""
    parts = string_parts(node)
    if not all(isinstance(part, str) for part in parts):
        raise BicepError(f"{text_of(node)} is not a plain string")
    return "".join(str(part) for part in parts)


def string_parts(node: Node) -> list[str | Node]:
    """Text, and the expressions between."""
    if node.type != "string":
        raise BicepError(f"{text_of(node)[:60]!r} is not a string")
    if text_of(node).startswith("'''"):
        return [text_of(node)[3:-3].removeprefix("\n")]
    raw, begin = node.text or b"", node.start_byte
    parts: list[str | Node] = []
    at = 1
    for child in node.named_children:
        if child.type == "interpolation":  # text is taken from between them: the grammar leaves some out of its nodes
            opening, closing = child.children[0], child.children[-1]
            brace = opening.end_byte - len("${")  # the node itself begins at blanks before it
            parts += [_unescaped(raw[at : brace - begin]), child.named_children[0]]
            at = closing.end_byte - begin
    return [*parts, _unescaped(raw[at:-1])]


def _unescaped(raw: bytes) -> str:
    return re.sub(r"\\(.)", lambda match: _ESCAPES[match.group()], raw.decode())


def properties(node: Node) -> list[tuple[Node, Node]]:
    """Keys and values of an object. Raises BicepError where a key is there twice."""
    pairs = [(one.named_children[0], one.named_children[1]) for one in _plain(node) if one.type == "object_property"]
    keys = [text_of(key) for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise BicepError(f"{key} is in one object twice (line {node.start_point[0] + 1})")
    return pairs


def items(node: Node) -> list[Node]:
    """Of an array or an argument list."""
    return _plain(node)


def _may_loop(node: Node) -> bool:
    """As Bicep's compiler allows it. It would also take objects inside arrays on the way, which nothing here needs."""
    above = node.parent
    if above is None or above.type != "object_property":
        return above is not None and above.type in _LOOPS
    while above is not None and above.type in ("object", "object_property", "if_statement"):
        above = above.parent
    if above is not None and above.type == "for_statement":  # only the one that makes several resources: loops of properties do not nest
        above = above.parent
    return above is not None and above.type in ("resource_declaration", "module_declaration")


def _plain(node: Node) -> list[Node]:
    return [child for child in node.named_children if child.type not in ("comment", "diagnostic_comment")]


def _decorator(node: Node) -> tuple[str, Node]:
    call = node.named_children[0]
    if call.type != "call_expression":
        raise BicepError(f"{text_of(node)[:60]!r}: this reader knows decorators with arguments only")
    return text_of(call.named_children[0]), call.named_children[1]


def _declaration(node: Node, decorators: dict[str, Node]) -> Declaration:
    kind = _DECLARATIONS[node.type]
    parts = _plain(node)
    equals = [index for index, child in enumerate(node.children) if child.type == "="]
    body = next((child for child in node.children[equals[0] + 1 :] if child.is_named and child.type != "comment"), None) if equals else None
    kind_of = ""
    if kind in ("param", "output"):
        kind_of = text_of(parts[1])
    elif kind in ("resource", "module"):
        kind_of = literal(parts[1])
    return Declaration(
        kind=kind,
        name=text_of(parts[0]),
        node=node,
        body=body,
        type=kind_of,
        existing=any(child.type == "existing" or text_of(child) == "existing" for child in node.children),
        decorators=decorators,
    )
