"""What a template would create, worked out without Azure: parameters in, resources with all their values out.

Names that only Azure knows before it has made something (addresses, principals) are made up in their real form. A name, parameter,
function or output that is not there is an error here as it is in Bicep's compiler.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tree_sitter import Node

from tests.infra import bicep
from tests.infra import functions
from tests.infra.bicep import BicepError
from tests.infra.bicep import Declaration
from tests.infra.bicep import Template
from tests.infra.bicep import text_of

_TYPES: dict[str, Any] = {"string": str, "int": int, "bool": bool, "array": list, "object": dict}
_AT_RUN_TIME = {
    ("Microsoft.Batch/batchAccounts", "accountEndpoint"): "{name}.westeurope.batch.azure.com",
    ("Microsoft.ContainerRegistry/registries", "loginServer"): "{name}.azurecr.io",
    ("Microsoft.KeyVault/vaults", "vaultUri"): "https://{name}.vault.azure.net/",
    ("Microsoft.ManagedIdentity/userAssignedIdentities", "principalId"): "{uuid}",
    ("Microsoft.ManagedIdentity/userAssignedIdentities", "clientId"): "{uuid}",
}
_BINARY = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Resource:
    """One that would be created (or, existing, that is named)."""

    type: str
    version: str
    name: str
    id: str
    body: dict[str, Any]
    scope: str
    """The id of what it extends or is deployed to."""
    file: str
    existing: bool

    def __str__(self) -> str:
        return f"{self.file}: {self.type} {self.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployed:
    """Of a template with all its modules."""

    resources: list[Resource]
    outputs: dict[str, Any]

    def of(self, type_name: str) -> list[Resource]:
        return [one for one in self.resources if one.type == type_name]


def deploy_file(parameter_file: Path, environment: Mapping[str, str], **instead: Any) -> Deployed:
    """A .bicepparam file with the template that it is for, and other values for some of it. Raises BicepError."""
    template = bicep.read(parameter_file)
    scope = _Scope(template, {}, environment, [])
    return deploy(bicep.using(template), {one.name: scope.value(one.name) for one in template.of("var")} | instead)


def deploy(path: Path, parameters: Mapping[str, Any]) -> Deployed:
    """Raises BicepError."""
    resources: list[Resource] = []
    outputs = _Scope(bicep.read(path), parameters, {}, resources).run()
    return Deployed(resources=resources, outputs=outputs)


class _Scope:
    """The names of one file, each worked out when it is asked for."""

    def __init__(self, template: Template, given: Mapping[str, Any], environment: Mapping[str, str], made: list[Resource]) -> None:
        self._template, self._made = template, made
        self._functions = functions.known(template, environment)
        self._known: dict[str, Any] = {}
        self._busy: set[str] = set()
        declared = {one.name for one in template.of("param")}
        if unknown := sorted(set(given) - declared):
            raise BicepError(f"{template.path.name} has no parameter {', '.join(unknown)}")
        for one in template.of("param"):
            self._known[one.name] = self._parameter(one, given)

    def run(self) -> dict[str, Any]:
        for one in self._template.of("resource", "module"):
            self.value(one.name)
        return {one.name: self._typed(one, self._evaluate(one.body, {})) for one in self._template.of("output")}

    def value(self, name: str) -> Any:
        if name not in self._known:
            one = self._template.symbol(name)
            if one is None:
                raise BicepError(f"{self._template.path.name}: {name} is not declared")
            if name in self._busy:
                raise BicepError(f"{self._template.path.name}: {name} depends on itself")
            self._busy.add(name)
            make = {"var": self._variable, "resource": self._declared, "module": self._declared}[one.kind]
            self._known[name] = make(one)
        return self._known[name]

    def _parameter(self, one: Declaration, given: Mapping[str, Any]) -> Any:
        if one.name in given:
            value = given[one.name]
        elif one.body is not None:
            value = self._evaluate(one.body, {})
        else:
            raise BicepError(f"{self._template.path.name}: parameter {one.name} is not given and has no default")
        return self._typed(one, value)

    def _typed(self, one: Declaration, value: Any) -> Any:
        what = f"{self._template.path.name}: {one.kind} {one.name}"
        if one.type not in _TYPES:
            raise BicepError(f"{what} is of type {one.type}, which this reader does not know")
        if not isinstance(value, _TYPES[one.type]) or (one.type == "int" and isinstance(value, bool)):
            raise BicepError(f"{what} is {value!r}, expected {one.type}")
        limits = {name: self._evaluate(bicep.items(node)[0], {}) for name, node in one.decorators.items() if bicep.items(node)}
        size: int = value if isinstance(value, int) else len(value)
        if "allowed" in limits and value not in limits["allowed"]:
            raise BicepError(f"{what} is {value!r}, allowed are {limits['allowed']}")
        if size < limits.get("minValue", limits.get("minLength", size)) or size > limits.get("maxValue", limits.get("maxLength", size)):
            raise BicepError(f"{what} is {value!r}, outside of {limits}")
        return value

    def _variable(self, one: Declaration) -> Any:
        return self._evaluate(one.body, {})

    def _declared(self, one: Declaration) -> Any:
        """A resource or module, a list of them for a loop, None where its condition does not hold."""
        body, make = one.body, self._resource if one.kind == "resource" else self._module
        if body is not None and body.type == "for_statement":
            return [make(one, inner, names) for inner, names in self._rounds(body, {})]
        if body is not None and body.type == "if_statement":
            condition, body = bicep.items(body)
            if not self._evaluate(condition, {}):
                return None
        return make(one, body, {})

    def _resource(self, one: Declaration, node: Node | None, local: dict[str, Any]) -> Resource:
        body = self._evaluate(node, local)
        kind, _, version = one.type.partition("@")
        parent, scope, own = body.pop("parent", None), body.pop("scope", None), body.pop("name")
        body.pop("dependsOn", None)
        name = f"{parent.name}/{own}" if parent is not None else own
        if name.count("/") != kind.count("/") - 1:
            raise BicepError(f"{self._template.path.name}: {kind} is called {name}; segments of type and name do not match")
        at = scope.id if scope is not None else self._functions["scope"]()
        names, types = name.split("/"), kind.split("/")
        pairs = "/".join(f"{part}/{value}" for part, value in zip(types[1:], names, strict=True))
        made = Resource(
            type=kind,
            version=version,
            name=name,
            id=f"{at}/providers/{types[0]}/{pairs}",
            body=_without_null(body),
            scope=at,
            file=self._template.path.name,
            existing=one.existing,
        )
        if not made.existing and any(other.id == made.id and not other.existing for other in self._made):
            raise BicepError(f"{made} is created twice")
        self._made.append(made)
        return made

    def _module(self, one: Declaration, node: Node | None, local: dict[str, Any]) -> dict[str, Any]:
        body = self._evaluate(node, local)
        path = (self._template.path.parent / one.type).resolve()
        if not path.is_file():
            raise BicepError(f"{self._template.path.name}: module {one.name}: there is no {one.type}")
        if unknown := set(body) - {"name", "scope", "params", "dependsOn"}:
            raise BicepError(f"{self._template.path.name}: module {one.name} has {sorted(unknown)}")
        scope = {"/subscriptions": "subscription"}.get(str(body.get("scope", {}).get("id", ""))[:14], "resourceGroup")
        template = bicep.read(path)
        if template.scope != scope:
            raise BicepError(f"{self._template.path.name}: module {one.name} is for a {template.scope}, deployed to a {scope}")
        for name, passed in _passed_on(node):
            ours, its = (where.declarations.get(("param", called)) for where, called in ((self._template, passed), (template, name)))
            if ours is not None and its is not None and (more := _more(ours, its)):
                raise BicepError(f"{self._template.path.name}: module {one.name}: {passed} may be {more}, and {name} may not (BCP036)")
        inner = _Scope(template, body.get("params", {}), {}, self._made)
        return {"name": body["name"], "outputs": inner.run()}

    def _rounds(self, node: Node, local: dict[str, Any]) -> list[tuple[Node, dict[str, Any]]]:
        names, over, body = bicep.items(node)
        loop = [text_of(name) for name in (names.named_children if names.type == "for_loop_parameters" else [names])]
        values = self._evaluate(over, local)
        return [(body, {**local, **dict(zip(loop, (value, index), strict=False))}) for index, value in enumerate(values)]

    def _evaluate(self, node: Node | None, local: dict[str, Any]) -> Any:
        if node is None:
            raise BicepError(f"{self._template.path.name}: a declaration without value")
        method = getattr(self, f"_{node.type}", None)
        if method is None:
            raise BicepError(f"{bicep.where(self._template.path, node)}: this reader does not know {node.type}")
        return method(node, local)

    def _string(self, node: Node, local: dict[str, Any]) -> str:
        return "".join(
            part if isinstance(part, str) else functions.to_string(self._evaluate(part, local)) for part in bicep.string_parts(node)
        )

    def _number(self, node: Node, local: dict[str, Any]) -> int:
        return int(text_of(node))

    def _boolean(self, node: Node, local: dict[str, Any]) -> bool:
        return text_of(node) == "true"

    def _null(self, node: Node, local: dict[str, Any]) -> None:
        return None

    def _identifier(self, node: Node, local: dict[str, Any]) -> Any:
        name = text_of(node)
        return local[name] if name in local else self.value(name)

    def _array(self, node: Node, local: dict[str, Any]) -> list[Any]:
        return [self._evaluate(item, local) for item in bicep.items(node)]

    def _object(self, node: Node, local: dict[str, Any]) -> dict[str, Any]:
        return {
            text_of(key) if key.type in ("identifier", "compatible_identifier") else self._evaluate(key, local): self._evaluate(
                value, local
            )
            for key, value in bicep.properties(node)
        }

    def _for_statement(self, node: Node, local: dict[str, Any]) -> list[Any]:
        return [self._evaluate(body, names) for body, names in self._rounds(node, local)]

    def _parenthesized_expression(self, node: Node, local: dict[str, Any]) -> Any:
        return self._evaluate(bicep.items(node)[0], local)

    def _ternary_expression(self, node: Node, local: dict[str, Any]) -> Any:
        condition, yes, no = bicep.items(node)
        return self._evaluate(yes if self._evaluate(condition, local) else no, local)

    def _unary_expression(self, node: Node, local: dict[str, Any]) -> Any:
        value = self._evaluate(bicep.items(node)[0], local)
        return not value if text_of(node.children[0]) == "!" else -value

    def _binary_expression(self, node: Node, local: dict[str, Any]) -> Any:
        left, right = bicep.items(node)
        sign = next(text_of(child) for child in node.children if not child.is_named)
        if sign in ("&&", "||"):
            first = self._evaluate(left, local)
            return first if first is (sign == "||") else self._evaluate(right, local)
        if sign not in _BINARY:
            raise BicepError(f"{bicep.where(self._template.path, node)}: this reader does not know {sign}")
        return _BINARY[sign](self._evaluate(left, local), self._evaluate(right, local))

    def _call_expression(self, node: Node, local: dict[str, Any]) -> Any:
        name, arguments = text_of(node.named_children[0]), bicep.items(node.named_children[1])
        if name not in self._functions:
            raise BicepError(f"{bicep.where(self._template.path, node)}: this reader does not know the function {name}")
        return self._functions[name](*(self._evaluate(argument, local) for argument in arguments))

    def _subscript_expression(self, node: Node, local: dict[str, Any]) -> Any:
        whole, index = (self._evaluate(part, local) for part in bicep.items(node))
        return whole[index]

    def _member_expression(self, node: Node, local: dict[str, Any]) -> Any:
        left, name = bicep.items(node)
        where, key = bicep.where(self._template.path, node), text_of(name)
        whole = self._evaluate(left, local)
        if whole is None:
            raise BicepError(f"{where}: {text_of(left)} is not deployed, and {text_of(node)} asks for it")
        if isinstance(whole, Resource):
            return _of_resource(whole, key, where)
        if key not in whole:
            raise BicepError(f"{where}: {text_of(left)} has no {key}")
        return whole[key]


def _passed_on(node: Node | None) -> list[tuple[str, str]]:
    """A module's parameters that are given by plain names: theirs, and the names."""
    given = [value for key, value in bicep.properties(node) if text_of(key) == "params"] if node is not None else []
    return [(text_of(key), text_of(value)) for one in given for key, value in bicep.properties(one) if value.type == "identifier"]


def _more(ours: Declaration, its: Declaration) -> str:
    """What one parameter may be and another one, which gets its value, may not. The compiler looks at that, whatever the value is."""
    if "allowed" not in its.decorators:
        return ""
    if "allowed" not in ours.decorators:
        return "anything"
    first, second = ({text_of(item) for item in bicep.items(bicep.items(one.decorators["allowed"])[0])} for one in (ours, its))
    return ", ".join(sorted(first - second))


def _of_resource(resource: Resource, key: str, where: str) -> Any:
    if key in ("id", "name", "type"):
        return resource.name.split("/")[-1] if key == "name" else getattr(resource, key)
    if key != "properties":
        raise BicepError(f"{where}: this reader does not know {key} of {resource}")
    known = {
        name: text.format(name=resource.name, uuid=uuid.uuid5(uuid.NAMESPACE_URL, resource.id + name))
        for (kind, name), text in _AT_RUN_TIME.items()
        if kind == resource.type
    }
    return {**resource.body.get("properties", {}), **known}


def _without_null(value: Any) -> Any:
    """Azure takes null for a property that is not there."""
    if isinstance(value, dict):
        return {key: _without_null(one) for key, one in value.items() if one is not None}
    return [_without_null(one) for one in value] if isinstance(value, list) else value


def undeclared(template: Template) -> list[str]:
    """Names in expressions, also those that no evaluation reaches, that nothing declares."""
    found = []
    for node in bicep.walk(template.root):
        if node.type != "identifier" or node.parent is None:
            continue
        parent, name = node.parent, text_of(node)
        declares = parent.type.endswith("_declaration") and parent.named_children[0] == node
        is_key = parent.type == "object_property" and parent.named_children[0] == node
        is_call = parent.type == "call_expression" and parent.named_children[0] == node
        if declares or is_key or is_call or parent.type == "type" or name in _loop_names(node):
            continue
        if template.symbol(name) is None:
            found.append(f"{bicep.where(template.path, node)}: {name} is not declared")
    return found


def _loop_names(node: Node) -> set[str]:
    names: set[str] = set()
    above: Node | None = node
    while above is not None:
        if above.type == "for_statement":
            names |= set(re.findall(r"\w+", text_of(bicep.items(above)[0])))
        above = above.parent
    return names
