"""A Jinja sandbox whose templates cannot run long or grow large.

Templates come with model files and are untrusted. Beyond Jinja's sandbox (no attribute or method
that reaches the interpreter, no mutation), every render has a meter:

* each pass through a loop, macro, filter, test, call or operator costs fuel, more for larger
  values;
* no value may exceed a size. Whatever could build a larger one (literals, ``~``, ``+``, ``*``,
  ``%``, filters, calls) is measured, and before it runs where one step could multiply sizes;
* everything written, to the output or to a buffer, counts against one budget.

The costs are inserted into the syntax tree, so they do not depend on tracing or on clocks: a
template that is cut is cut at the same place every time.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from types import GeneratorType
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_FUEL = 1_000_000
MAX_VALUE_SIZE = 8 * 1024 * 1024
MAX_VALUE_PARTS = 1024 * 1024
MAX_WRITTEN = 4 * MAX_VALUE_SIZE
_NODES_PER_FUEL = 16
_CHARS_PER_FUEL = 128
_PARTS_PER_FUEL = 4
_MAX_INT_BITS = 4096

# fmt: off
_STR_METHODS = frozenset({
    "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join",
    "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex",
    "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase",
    "title", "upper",
})
_FILTERS = frozenset({
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max",
    "min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr",
    "sort", "string", "sum", "title", "trim", "unique", "upper", "wordcount",
})
# fmt: on


class Meter:
    """What one render has left."""

    def __init__(self) -> None:
        self._fuel = MAX_FUEL
        self._unwritten = MAX_WRITTEN

    def burn(self, amount: int) -> None:
        """Takes fuel."""
        self._fuel -= amount
        if self._fuel < 0:
            raise TemplateError(f"the template runs too long (over {MAX_FUEL} steps)")

    def write(self, size: int) -> None:
        """Counts characters written."""
        self._unwritten -= size
        if self._unwritten < 0:
            raise TemplateError(f"the template writes too much (over {MAX_WRITTEN} characters)")

    def limit(self, size: int) -> None:
        """Refuses a value of that size."""
        if size > MAX_VALUE_SIZE:
            raise TemplateError("the template builds a value that is too large")

    def measure(self, value: Any) -> int:
        """Charges for a value and returns its size: characters and elements, all levels counted."""
        if isinstance(value, str):
            size, visited = len(value), 1
        else:
            size, visited = self._measure_parts(value)
        self.limit(size)
        self.burn(1 + visited // _PARTS_PER_FUEL + size // _CHARS_PER_FUEL)
        return size

    def _measure_parts(self, value: Any) -> tuple[int, int]:
        pending = [value]
        size = visited = 0
        while pending:
            item = pending.pop()
            visited += 1
            size += 1
            if isinstance(item, (str, bytes, range)):
                size += len(item)
            elif isinstance(item, dict):
                pending.extend(item)
                pending.extend(item.values())
            elif isinstance(item, (list, tuple, set, frozenset)):
                pending.extend(item)
            elif isinstance(item, Namespace):
                raise TemplateError("a namespace is used as a value")
            if size > MAX_VALUE_SIZE or visited + len(pending) > MAX_VALUE_PARTS:
                raise TemplateError("the template builds a value that is too large")
        return size, visited


_METER: ContextVar[Meter] = ContextVar("template_meter")


class _Instrument(NodeTransformer):
    """Inserts metering into a syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.test is not None:
            node.test = nodes.And(_call_filter(nodes.Const(1), "_burn", node), node.test)
        return self._charge_body(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._charge_body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._charge_body(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        return self._charge_body(node)

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:
        size = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        self.generic_visit(node)
        return [_statement("_write", size, node), node] if size else [node]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call_filter(nodes.List(node.nodes, lineno=node.lineno), "_concat", node)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _call_filter(node, "_measured", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _call_filter(node, "_measured", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _call_filter(node, "_measured", node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        sliced = isinstance(node.arg, nodes.Slice)
        return _call_filter(node, "_measured", node) if sliced else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _measured_operand(node.expr)
        for operand in node.ops:
            operand.expr = _measured_operand(operand.expr)
        return node

    def _charge_body(self, node: Any) -> nodes.Node:
        weight = 1 + sum(1 for _ in node.find_all(nodes.Node)) // _NODES_PER_FUEL
        self.generic_visit(node)
        node.body.insert(0, _statement("_burn", weight, node))
        return node  # type: ignore[no-any-return]


def _measured_operand(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _call_filter(node, "_measured", node)


def _call_filter(value: nodes.Expr, name: str, at: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=at.lineno)


def _statement(name: str, amount: int, at: nodes.Node) -> nodes.Node:
    return nodes.ExprStmt(_call_filter(nodes.Const(amount), name, at), lineno=at.lineno)


class _GenerationTag(Extension):
    """``{% generation %}`` marks assistant text for training; here it only holds its body."""

    tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Parses up to ``{% endgeneration %}``."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates that run under a ``Meter``; see ``metered``."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed while compiling, when there is no meter
            finalize=_finalize,
            extensions=[LoopControlExtension, _GenerationTag],
        )
        allowed = {name: self.filters[name] for name in _FILTERS}
        self.filters = {name: _wrap_filter(name, rule) for name, rule in allowed.items()}
        self.filters["tojson"] = _to_json
        self.filters.update(_burn=_burn, _write=_write, _measured=_measured, _concat=_concat)
        tests: dict[str, Any] = dict(self.tests)
        self.tests.update((name, _wrap_test(rule)) for name, rule in tests.items())
        self.globals.pop("lipsum")
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        instrumented: nodes.Template = _Instrument().visit(tree)
        return instrumented

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allows reading; of methods, those whose cost is known."""
        if isinstance(obj, str):
            return attr in _STR_METHODS
        if isinstance(obj, dict):
            return attr in ("get", "items", "keys", "values")
        if isinstance(obj, (list, tuple)):
            return attr in ("count", "index")
        if isinstance(obj, (int, float, bytes)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` is not available: its widths have no bound."""
        return None

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Runs an operator whose result may be large, if it is not."""
        meter = _METER.get()
        sizes = meter.measure(left), meter.measure(right)
        if operator == "+":
            meter.limit(sum(sizes))
        elif operator == "%":
            if isinstance(left, str):
                _check_format(left, sizes[1])
        elif isinstance(left, (int, float)) and isinstance(right, (int, float)):
            _check_number(operator, left, right)
        elif operator == "*":
            factor = left if isinstance(left, int) else right
            meter.limit(max(sizes) * (factor if isinstance(factor, int) else 1))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls what a template calls, measured before and after."""
        meter = _METER.get()
        owner = getattr(__obj, "__self__", None)
        for value in (*args, *kwargs.values()):
            _measured(value)
        if isinstance(owner, str):
            size = meter.measure(owner)
            if __obj.__name__ == "replace" and len(args) > 1:
                _check_replace(owner, *args[:2])
            elif __obj.__name__ == "join" and args:
                meter.limit(meter.measure(args[0]) * (1 + size))
        return _watch(super().call(__context, __obj, *args, **kwargs))


@contextmanager
def metered() -> Iterator[None]:
    """Templates that run inside share a fresh meter."""
    token = _METER.set(Meter())
    try:
        yield
    finally:
        _METER.reset(token)


def _watch(result: Any) -> Any:
    """Measures a result; one that is computed step by step is charged step by step."""
    meter = _METER.get()
    if isinstance(result, (GeneratorType, map, filter, zip)):
        return _charged(result, meter)
    if isinstance(result, (str, bytes, dict, list, tuple, set, frozenset)):
        meter.measure(result)
    else:
        meter.burn(1)
    return result


def _charged(items: Iterable[Any], meter: Meter) -> Iterator[Any]:
    for item in items:
        meter.burn(1)
        yield item


def _wrap_filter(name: str, rule: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(rule, "jinja_pass_arg") else 0
    check = _FILTER_CHECKS.get(name)

    @functools.wraps(rule)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        for value in (*args[first:], *kwargs.values()):
            if not isinstance(value, GeneratorType):
                meter.measure(value)
        if check is not None:
            # Generators are read here once, so that their size is known.
            head = args[first]
            if isinstance(head, GeneratorType):
                head = list(head)
                meter.measure(head)
                args = (*args[:first], head, *args[first + 1 :])
            check(*args[first:], **kwargs)
        return _watch(rule(*args, **kwargs))

    return wrapped


def _wrap_test(rule: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(rule, "jinja_pass_arg") else 0

    @functools.wraps(rule)
    def wrapped(*args: Any) -> Any:
        meter = _METER.get()
        meter.burn(1)
        for value in args[first:]:
            if isinstance(value, (str, dict, list, tuple)):
                meter.measure(value)
        return rule(*args)

    return wrapped


def _check_replace(text: Any, old: Any, new: Any, *_: Any, **__: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    if len(new) > len(old):
        occurrences = text.count(old)
        _METER.get().limit(len(text) + occurrences * (len(new) - len(old)))


def _check_join(items: Any, d: Any = "", *_: Any, **__: Any) -> None:
    meter = _METER.get()
    meter.limit(meter.measure(items) * (1 + len(str(d))))


def _check_indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    width = len(width) if isinstance(width, str) else int(width)
    text = str(text)
    _METER.get().limit(len(text) + width * (1 + len(text.splitlines())))


def _check_sum(items: Any, attribute: Any = None, start: Any = 0, **_: Any) -> None:
    if not isinstance(start, (int, float)):
        raise TemplateError("sum adds numbers only")


_FILTER_CHECKS: dict[str, Callable[..., None]] = {
    "replace": _check_replace,
    "join": _check_join,
    "indent": _check_indent,
    "sum": _check_sum,
}


def _check_number(operator: str, left: float, right: float) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        bits = bits * max(right, 0) if operator == "**" else bits + right.bit_length()
        if bits > _MAX_INT_BITS:
            raise TemplateError("the template computes a number that is too large")


def _check_format(pattern: str, size: int) -> None:
    if re.search(r"%[^a-zA-Z%]*(\d{4}|\*)", pattern):
        raise TemplateError("a format has a width that is too large")
    _METER.get().limit(len(pattern) + pattern.count("%") * (size + 1000))


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    meter = _METER.get()
    meter.write(meter.measure(value))
    return value


def _burn(amount: int) -> bool:
    _METER.get().burn(amount)
    return True


def _write(amount: int) -> None:
    _METER.get().write(amount)


def _measured(value: Any) -> Any:
    if not isinstance(value, Namespace):
        _METER.get().measure(value)
    return value


def _concat(parts: list[Any]) -> str:
    _METER.get().measure(parts)
    return "".join(map(str, parts))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as chat templates expect it: nothing escaped for HTML."""
    meter = _METER.get()
    meter.measure(value)
    if indent is not None and not 0 <= indent <= 16:
        raise TemplateError("tojson indents by at most 16")
    if separators is not None and sum(map(len, separators)) > 16:
        raise TemplateError("tojson separators are too long")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    chunks: list[str] = []
    size = 0
    for chunk in encoder.iterencode(value):
        size += len(chunk)
        meter.limit(size)
        chunks.append(chunk)
    meter.burn(1 + size // _CHARS_PER_FUEL)
    return "".join(chunks)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 256 or re.search(r"%[^a-zA-Z%]*\d", pattern):
        raise TemplateError("strftime_now takes a short format without widths")
    return datetime.now().strftime(pattern)
