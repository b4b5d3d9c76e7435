"""Run chat templates in a sandbox: without side effects, and with a limited number of steps and characters.

A template comes with a model and is not trusted. Without limits, nested loops and `'a' * 10**10` would take hours or
all memory. Steps are counted, not seconds, so that a template fails on all machines or on none.
- Each body of a loop, macro or block counts its nodes every time it runs.
- Operators, calls, filters, tests, comparisons and outputs count the characters and items that they read and create.
- For operations with long results (`*`, `%`, `replace`, `join`, `center`, …), the length is computed beforehand.

Example:
    >>> sandbox = Sandbox()
    >>> sandbox.render(sandbox.from_string("{{ 'ab' * n }}"), {"n": 3})
    'ababab'
    >>> sandbox.render(sandbox.from_string("{{ 'ab' * n }}"), {"n": 10**10})
    Traceback (most recent call last):
        ...
    llmctl.config.errors.RequestError: the template makes a value of more than 20,000,000 characters
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterable, KeysView, ValuesView
from typing import Any

from jinja2 import Template, nodes
from jinja2.filters import make_attrgetter
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from llmctl.config.errors import RequestError
from llmctl.config.limits import TEMPLATE, TEMPLATE_BITS, TEMPLATE_STEPS, TEMPLATE_TEXT

BLOCK = 64
"""Number of characters or items that count as one step."""
BODIES = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)
"""Template nodes whose body may run several times."""
PADDING = frozenset(["center", "ljust", "rjust", "zfill", "expandtabs"])
"""String methods for which an argument determines the length of the result."""
BACKWARDS = frozenset(["rfind", "rindex", "rsplit", "rpartition"])
"""String methods that take time proportional to the product of the lengths of the string and the argument."""
REFUSED_METHODS = frozenset(["translate", "to_bytes", "fromkeys"])
"""Rejected methods: an argument determines the length of their result, and no template needs them."""
REFUSED_FILTERS = frozenset(["striptags", "urlize", "xmlattr"])
"""Rejected filters, which are for web pages and whose time grows faster than the length of the text."""
LENGTHENING = frozenset(["center", "indent", "batch", "slice", "tojson", "round", "wordwrap", "truncate"])
"""Filters for which an argument determines the length of the result."""
SHALLOW = frozenset([
    "length", "count", "first", "last", "list", "default", "d", "items", "map", "select", "reject", "selectattr",
    "rejectattr", "reverse", "attr", "random", "defined", "undefined", "none", "mapping", "iterable", "sequence",
    "string", "number", "true", "false", "boolean", "integer", "float", "callable", "sameas", "filter", "test",
])  # fmt: skip
"""Filters and tests that do not read the content of the items of a value, except for the filter `string`."""
CONTAINERS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class Sandbox(ImmutableSandboxedEnvironment):
    """Define a Jinja environment that enforces the limits of `llmctl.config.limits` on templates."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, **options: Any) -> None:
        # The optimizer would compute constants. `finalize` gets each value before it is printed.
        super().__init__(optimized=False, finalize=self.read, **options)
        self._left = TEMPLATE_STEPS
        kept = {name: f for name, f in self.filters.items() if name not in REFUSED_FILTERS}
        self.filters = {name: self._counted(name, f, name in SHALLOW - {"string"}) for name, f in kept.items()}
        self.tests = {name: self._counted(name, f, name in SHALLOW) for name, f in self.tests.items()}
        del self.globals["lipsum"]

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter to the environment. Its characters and items count as steps, as in Jinja's own filters."""
        self.filters[name] = self._counted(name, function, False)

    def from_string(self, source: Any, *rest: Any, **more: Any) -> Template:
        """Compile a template.

        Raises:
            RequestError: If its text is too long.
        """
        if len(source) > TEMPLATE:
            raise RequestError(f"the template has {len(source):,} characters; at most {TEMPLATE:,} are read")
        tree = self.parse(source)
        for node in list(tree.find_all((*BODIES, nodes.Compare, nodes.Getitem, nodes.Concat, nodes.Pair))):
            self._instrument(node)
        return super().from_string(tree, *rest, **more)  # pyright: ignore[reportArgumentType]: it accepts a tree

    def render(self, template: Template, values: dict[str, Any]) -> str:
        """Return the output of a template.

        Raises:
            RequestError: If it takes too many steps or characters.
        """
        self._left = TEMPLATE_STEPS
        parts, size = [], 0
        for part in template.generate(values):
            parts.append(part)
            size += len(part)
            _allow(size)
        return "".join(parts)

    def spend(self, steps: int) -> bool:
        """Count `steps`, and return True so that templates can call this in conditions.

        Raises:
            RequestError: If the template exceeds the limit of steps.
        """
        self._left -= steps
        if self._left < 0:
            raise RequestError(f"the template takes more than {TEMPLATE_STEPS:,} steps")
        return True

    def read(self, value: Any) -> Any:
        """Count the characters and items of a value, including inner lists and objects, and return the value."""
        self.weigh(value)
        return value

    def weigh(self, value: Any) -> int:
        """Return the size of a value, an upper bound of the length of its text, and count it as steps.

        A part that occurs several times counts each time.
        """
        size, stack = 0, [value]
        while stack:
            item = stack.pop()
            own = len(item) if isinstance(item, (str, bytes)) else 1
            if isinstance(item, dict):
                stack.extend(item)
                stack.extend(item.values())
            elif isinstance(item, CONTAINERS):
                stack.extend(item)
            elif isinstance(item, Namespace):
                stack.append(object.__getattribute__(item, "_Namespace__attrs"))
            size += own
            self.spend(1 + own // BLOCK)
            _allow(size)
        return size

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join the output of a macro or block, after a check of its length."""
        parts = list(parts)
        _allow(sum(map(len, parts)))
        return "".join(parts)

    def joined(self, *parts: Any) -> str:
        """Return the result of the operator `~`, after a check of its length."""
        _allow(sum(map(self.weigh, parts)))
        return "".join(map(str, parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operator, after a check of the size of its result."""
        if operator == "*":
            count, other = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(count, int) and isinstance(other, int):
                _allow_bits(count.bit_length() + other.bit_length())
            elif isinstance(count, int):
                _allow(_length(other) * max(count, 0))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _allow_bits(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, (str, bytes)):
            self._allow_percent(left, right)
        elif operator == "+":
            _allow(_length(left) + _length(right))
        return self._made(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return True if a template may use the attribute."""
        return attr not in REFUSED_METHODS and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a replacement of `str.format` that checks the sizes of its fields first."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None
        text, mapped = value.__self__, value.__name__ == "format_map"

        def bounded(*args: Any, **kwargs: Any) -> str:
            _BoundedFormatter(self).vformat(text, () if mapped else args, args[0] if mapped and args else kwargs)
            return inner(*args, **kwargs)

        return bounded

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function, a macro or a method of a value, with checks of the sizes of arguments and result."""
        if obj in (self.spend, self.read, self.joined):  # inserted by `_instrument`
            return obj(*args)
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if not isinstance(obj, (Macro, type)):
            self.spend(sum(map(self.weigh, (*args, *kwargs.values()))) // BLOCK)
        if isinstance(owner, (str, bytes)):
            self.spend(len(owner) // BLOCK)
            if name in PADDING:
                _allow((len(owner) if name == "expandtabs" else 1) * _numbers((*args, *kwargs.values())) + len(owner))
            elif name in BACKWARDS:
                self.spend(len(owner) * sum(map(_length, args)) // BLOCK**2)
            elif name == "replace":
                _allow_replacing(owner, *args)
            elif name == "join":
                args = (self._joining(owner, *args), *args[1:])
        elif isinstance(owner, (list, tuple)):
            self.read(owner)
        return self._made(super().call(context, obj, *args, **kwargs))

    def _instrument(self, node: Any) -> None:
        """Insert calls of `spend`, `read` and `joined` into the parsed template."""
        if isinstance(node, nodes.Compare):
            for operand in (node, *node.ops):
                operand.expr = self._own("read", operand.expr)
        elif isinstance(node, nodes.Getitem):
            if isinstance(node.arg, nodes.Slice):
                node.node = self._own("read", node.node)
            elif not isinstance(node.arg, nodes.Const):
                node.arg = self._own("read", node.arg)
        elif isinstance(node, nodes.Pair):
            node.key = node.key if isinstance(node.key, nodes.Const) else self._own("read", node.key)
        elif isinstance(node, nodes.Concat):
            node.nodes = [self._own("joined", *node.nodes)]
        else:
            steps = 1 + sum(1 for child in node.body for _ in _inside(child))
            node.body.insert(0, nodes.ExprStmt(self._own("spend", nodes.Const(steps))))
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = nodes.And(self._own("spend", nodes.Const(1)), node.test)

    def _own(self, name: str, *args: Any) -> nodes.Expr:
        return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)

    def _counted(self, name: str, function: Callable[..., Any], shallow: bool) -> Callable[..., Any]:
        """Return a filter or test that counts the characters and items that it reads and creates."""
        first = int(hasattr(function, "jinja_pass_arg"))  # such functions get the environment or context first

        def counted(*args: Any, **kwargs: Any) -> Any:
            value, given = args[first], (*args[first + 1 :], *kwargs.values())
            size = 1 if shallow else self.weigh(value)
            self.spend(1 + (0 if shallow else sum(map(self.weigh, given)) // BLOCK))
            if name in LENGTHENING:
                texts = sum(len(a) for a in given if isinstance(a, str))
                _allow((size + 1) * max(_numbers(given), texts, 1))
            elif name == "replace":
                _allow_replacing(str(value), *map(str, given[:2]))
            elif name == "join":
                value = list(value)
                self._joining(str(kwargs.get("d", given[0] if given else "")), self._attributes(value, args, kwargs))
                args = (*args[:first], value, *args[first + 1 :])
            elif name == "format":
                self._allow_percent(str(value), kwargs or given)
            elif name == "sum" and given:  # lists are copied at each step
                self.spend(size * _length(value) // BLOCK)
            return self._made(function(*args, **kwargs))

        if first:
            counted.jinja_pass_arg = function.jinja_pass_arg  # pyright: ignore[reportFunctionMemberAccess]
        return counted

    def _attributes(self, items: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return the values that the filter `join` joins: the items, or an attribute of each item."""
        attribute = kwargs.get("attribute", args[3] if len(args) > 3 else None)
        return items if attribute is None else list(map(make_attrgetter(self, attribute), items))

    def _joining(self, between: Any, parts: Iterable[Any]) -> list[Any]:
        """Return the parts of a text to join as a list, after a check of their total length."""
        found, size = [], 0
        for part in parts:
            found.append(part)
            size += self.weigh(part) + len(between)
            _allow(size)
        return found

    def _allow_percent(self, text: Any, values: Any) -> None:
        """Check the length of the result of `text % values` before it is computed.

        The width of a field is in the text or, for `*`, in the values.
        """
        shown = text.decode("latin-1") if isinstance(text, bytes) else str(text)
        given = values if isinstance(values, tuple) else (values,)
        widest = sum(map(self.weigh, given))
        widths = [int(digits[:12]) for digits in re.findall(r"\d+", shown)]
        star = _numbers(given) if "*" in shown else 0
        _allow(len(shown) + sum(widths) * ("%" in shown) + shown.count("%") * (widest + star))

    def _made(self, value: Any) -> Any:
        size = _length(value)
        _allow(size)
        self.spend(1 + size // BLOCK)
        return value


class _BoundedFormatter(SandboxedFormatter):
    """Format strings for `str.format`. Wide fields and long results are rejected before they are created."""

    size = 0

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(sandbox)
        self._sandbox = sandbox

    def format_field(self, value: Any, format_spec: str) -> str:
        """Return the text of one field, after a check of its length."""
        self.size += self._sandbox.weigh(value) + sum(int(d[:12]) for d in re.findall(r"\d+", format_spec))
        _allow(self.size)
        return super().format_field(value, format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """Return a value converted by `!r` or `!s`, after counting its size."""
        return super().convert_field(self._sandbox.read(value), conversion)


def _inside(node: nodes.Node) -> Iterable[nodes.Node]:
    """Yield a node and its descendants, except the bodies that may run several times. These count their own nodes."""
    yield node
    for child in () if isinstance(node, BODIES) else node.iter_child_nodes():
        yield from _inside(child)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, dict, range, *CONTAINERS)) else 1


def _numbers(values: Iterable[Any]) -> int:
    return sum(abs(v) for v in values if isinstance(v, int))


def _allow(size: int) -> None:
    if size > TEMPLATE_TEXT:
        raise RequestError(f"the template makes a value of more than {TEMPLATE_TEXT:,} characters")


def _allow_bits(bits: int) -> None:
    if bits > TEMPLATE_BITS:
        raise RequestError(f"the template makes a number of more than {TEMPLATE_BITS:,} bits")


def _allow_replacing(text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
    times = text.count(old) if old else len(text) + 1
    _allow(len(text) + times * len(new))
