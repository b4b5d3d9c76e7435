"""Run Jinja templates in a sandbox: without side effects, and with a limited number of steps and characters.

Templates are not trusted, because a template may come with a model from an unknown author. Nested loops could take
hours, and an expression such as `'a' * 10**10` could take all memory. Steps are counted instead of seconds, so that a
template fails on all machines or on none:
- Each execution of a loop's, macro's or block's body takes one step per node of the body's syntax tree.
- Operators, calls, filters, tests, comparisons and outputs take a step per 64 characters or items that they read and
  create.
- For operations with long results (`*`, `%`, `replace`, `join`, `center`, …), the length is checked beforehand.

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
"""Kinds of nodes in a template's syntax tree whose body may run several times, such as loops."""
PADDING = frozenset(["center", "ljust", "rjust", "zfill", "expandtabs"])
"""Names of string methods for which an argument determines the length of the result."""
SLOW_METHODS = frozenset(["rfind", "rindex", "rsplit", "rpartition"])
"""Names of string methods that take time proportional to the product of two lengths: the string's and the
argument's."""
REJECTED_METHODS = frozenset(["translate", "to_bytes", "fromkeys"])
"""Names of methods that templates may not call. An argument of these methods determines the length of the result. No
known template needs these methods."""
REJECTED_FILTERS = frozenset(["striptags", "urlize", "xmlattr"])
"""Names of filters that templates may not use. These filters are for web pages, and take time that grows faster
than the length of the text."""
LENGTHENING = frozenset(["center", "indent", "batch", "slice", "tojson", "round", "wordwrap", "truncate"])
"""Names of filters for which an argument determines the length of the result."""
SHALLOW = frozenset([
    "length", "count", "first", "last", "list", "default", "d", "items", "map", "select", "reject", "selectattr",
    "rejectattr", "reverse", "attr", "random", "defined", "undefined", "none", "mapping", "iterable", "sequence",
    "string", "number", "true", "false", "boolean", "integer", "float", "callable", "sameas", "filter", "test",
])  # fmt: skip
"""Names of filters and tests that do not read the content of a value's items. The name `string` means only the test
`string`, because the filter `string` reads the items."""
CONTAINERS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class Sandbox(ImmutableSandboxedEnvironment):
    """Compile and render Jinja templates, and enforce the limits of `llmctl.config.limits`."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, **options: Any) -> None:
        # The optimizer would compute constants. `finalize` gets each value before it is printed.
        super().__init__(optimized=False, finalize=self.read, **options)
        self._steps_left = TEMPLATE_STEPS
        kept = {name: f for name, f in self.filters.items() if name not in REJECTED_FILTERS}
        self.filters = {name: self._counted(name, f, name in SHALLOW - {"string"}) for name, f in kept.items()}
        self.tests = {name: self._counted(name, f, name in SHALLOW) for name, f in self.tests.items()}
        del self.globals["lipsum"]

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter to the environment.

        The characters that the filter reads and returns count towards the limit of steps, as for Jinja's own filters.
        """
        self.filters[name] = self._counted(name, function, False)

    def from_string(self, source: Any, *rest: Any, **more: Any) -> Template:
        """Compile a template.

        Raises:
            RequestError: If the template's text is too long.
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
            RequestError: If the template takes too many steps, or if its output or a value is too long.
        """
        self._steps_left = TEMPLATE_STEPS
        parts, size = [], 0
        for part in template.generate(values):
            parts.append(part)
            size += len(part)
            _check_size(size)
        return "".join(parts)

    def count_steps(self, steps: int) -> bool:
        """Add `steps` to the number of steps that the template has taken. Return True, so that templates can call this
        method in conditions.

        Raises:
            RequestError: If the template exceeds the limit of steps.
        """
        self._steps_left -= steps
        if self._steps_left < 0:
            raise RequestError(f"the template takes more than {TEMPLATE_STEPS:,} steps")
        return True

    def read(self, value: Any) -> Any:
        """Count the steps for reading a value, and return the value unchanged. Longer values take more steps.

        The size of a value includes the sizes of its items.
        """
        self.measure(value)
        return value

    def measure(self, value: Any) -> int:
        """Return the size of a value in characters and items, and count the size as steps.

        The size is an upper bound on the length of the value as text. A part that occurs several times counts each
        time.
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
            self.count_steps(1 + own // BLOCK)
            _check_size(size)
        return size

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join the parts of the output of a macro or block. The total length is checked first."""
        parts = list(parts)
        _check_size(sum(map(len, parts)))
        return "".join(parts)

    def concatenate(self, *parts: Any) -> str:
        """Compute the operator `~`, which concatenates values as text. The total length is checked first."""
        _check_size(sum(map(self.measure, parts)))
        return "".join(map(str, parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operator. The size of the result is checked first."""
        if operator == "*":
            count, other = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(count, int) and isinstance(other, int):
                _check_bits(count.bit_length() + other.bit_length())
            elif isinstance(count, int):
                _check_size(_length(other) * max(count, 0))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, (str, bytes)):
            self._check_percent(left, right)
        elif operator == "+":
            _check_size(_length(left) + _length(right))
        return self._checked(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return True if a template may use the attribute `attr` of the object `obj`."""
        return attr not in REJECTED_METHODS and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a function that does the same as `str.format`, but checks the sizes of the fields first."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None
        text, mapped = value.__self__, value.__name__ == "format_map"

        def bounded(*args: Any, **kwargs: Any) -> str:
            _BoundedFormatter(self).vformat(text, () if mapped else args, args[0] if mapped and args else kwargs)
            return inner(*args, **kwargs)

        return bounded

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function, a macro or a method, and count the steps of the call.

        Longer results, and longer arguments of functions and methods, take more steps. A result that is too long is
        rejected.
        """
        if obj in (self.count_steps, self.read, self.concatenate):  # inserted by `_instrument`
            return obj(*args)
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if not isinstance(obj, (Macro, type)):
            self.count_steps(sum(map(self.measure, (*args, *kwargs.values()))) // BLOCK)
        if isinstance(owner, (str, bytes)):
            self.count_steps(len(owner) // BLOCK)
            if name in PADDING:
                _check_size(
                    (len(owner) if name == "expandtabs" else 1) * _numbers((*args, *kwargs.values())) + len(owner)
                )
            elif name in SLOW_METHODS:
                self.count_steps(len(owner) * sum(map(_length, args)) // BLOCK**2)
            elif name == "replace":
                _check_replacement(owner, *args)
            elif name == "join":
                args = (self._parts_to_join(owner, *args), *args[1:])
        elif isinstance(owner, (list, tuple)):
            self.read(owner)
        return self._checked(super().call(context, obj, *args, **kwargs))

    def _instrument(self, node: Any) -> None:
        """Insert calls that count steps and check lengths into a node of the template's syntax tree."""
        if isinstance(node, nodes.Compare):
            for operand in (node, *node.ops):
                operand.expr = self._call_node("read", operand.expr)
        elif isinstance(node, nodes.Getitem):
            if isinstance(node.arg, nodes.Slice):
                node.node = self._call_node("read", node.node)
            elif not isinstance(node.arg, nodes.Const):
                node.arg = self._call_node("read", node.arg)
        elif isinstance(node, nodes.Pair):
            node.key = node.key if isinstance(node.key, nodes.Const) else self._call_node("read", node.key)
        elif isinstance(node, nodes.Concat):
            node.nodes = [self._call_node("concatenate", *node.nodes)]
        else:
            steps = 1 + sum(1 for child in node.body for _ in _inside(child))
            node.body.insert(0, nodes.ExprStmt(self._call_node("count_steps", nodes.Const(steps))))
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = nodes.And(self._call_node("count_steps", nodes.Const(1)), node.test)

    def _call_node(self, name: str, *args: Any) -> nodes.Expr:
        return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)

    def _counted(self, name: str, function: Callable[..., Any], shallow: bool) -> Callable[..., Any]:
        """Wrap a filter or test, so that its inputs and its result count as steps.

        Args:
            name: Name of the filter or test.
            function: The filter or test.
            shallow: True if the filter or test does not read the content of the value's items.
        """
        first = int(hasattr(function, "jinja_pass_arg"))  # such functions get the environment or context first

        def counted(*args: Any, **kwargs: Any) -> Any:
            value, given = args[first], (*args[first + 1 :], *kwargs.values())
            size = 1 if shallow else self.measure(value)
            self.count_steps(1 + (0 if shallow else sum(map(self.measure, given)) // BLOCK))
            if name in LENGTHENING:
                texts = sum(len(a) for a in given if isinstance(a, str))
                _check_size((size + 1) * max(_numbers(given), texts, 1))
            elif name == "replace":
                _check_replacement(str(value), *map(str, given[:2]))
            elif name == "join":
                value = list(value)
                self._parts_to_join(
                    str(kwargs.get("d", given[0] if given else "")), self._attributes(value, args, kwargs)
                )
                args = (*args[:first], value, *args[first + 1 :])
            elif name == "format":
                self._check_percent(str(value), kwargs or given)
            elif name == "sum" and given:  # lists are copied at each step
                self.count_steps(size * _length(value) // BLOCK)
            return self._checked(function(*args, **kwargs))

        if first:
            counted.jinja_pass_arg = function.jinja_pass_arg  # pyright: ignore[reportFunctionMemberAccess]
        return counted

    def _attributes(self, items: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return the values that the filter `join` joins: the items or, if requested, an attribute of each item."""
        attribute = kwargs.get("attribute", args[3] if len(args) > 3 else None)
        return items if attribute is None else list(map(make_attrgetter(self, attribute), items))

    def _parts_to_join(self, between: Any, parts: Iterable[Any]) -> list[Any]:
        """Return the list of texts to join, after a check of their total length with separators."""
        found, size = [], 0
        for part in parts:
            found.append(part)
            size += self.measure(part) + len(between)
            _check_size(size)
        return found

    def _check_percent(self, text: Any, values: Any) -> None:
        """Check the length of `text % values` before it is computed.

        The width of a field such as `%5d` is in the text. The width of a field `%*d` is one of the values.
        """
        shown = text.decode("latin-1") if isinstance(text, bytes) else str(text)
        given = values if isinstance(values, tuple) else (values,)
        widest = sum(map(self.measure, given))
        widths = [int(digits[:12]) for digits in re.findall(r"\d+", shown)]
        star = _numbers(given) if "*" in shown else 0
        _check_size(len(shown) + sum(widths) * ("%" in shown) + shown.count("%") * (widest + star))

    def _checked(self, value: Any) -> Any:
        size = _length(value)
        _check_size(size)
        self.count_steps(1 + size // BLOCK)
        return value


class _BoundedFormatter(SandboxedFormatter):
    """Format a string as `str.format` does, but reject wide fields and long results before they are created."""

    size = 0

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(sandbox)
        self._sandbox = sandbox

    def format_field(self, value: Any, format_spec: str) -> str:
        """Format one field. Its length is checked first."""
        self.size += self._sandbox.measure(value) + sum(int(d[:12]) for d in re.findall(r"\d+", format_spec))
        _check_size(self.size)
        return super().format_field(value, format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """Convert a value by `!r` or `!s`. The size of the value counts as steps."""
        return super().convert_field(self._sandbox.read(value), conversion)


def _inside(node: nodes.Node) -> Iterable[nodes.Node]:
    """Yield a node of the syntax tree and its descendants, without the bodies of inner loops, macros and blocks.

    The steps of these bodies are counted separately, because a body may run several times.
    """
    yield node
    for child in () if isinstance(node, BODIES) else node.iter_child_nodes():
        yield from _inside(child)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, dict, range, *CONTAINERS)) else 1


def _numbers(values: Iterable[Any]) -> int:
    return sum(abs(v) for v in values if isinstance(v, int))


def _check_size(size: int) -> None:
    if size > TEMPLATE_TEXT:
        raise RequestError(f"the template makes a value of more than {TEMPLATE_TEXT:,} characters")


def _check_bits(bits: int) -> None:
    if bits > TEMPLATE_BITS:
        raise RequestError(f"the template makes a number of more than {TEMPLATE_BITS:,} bits")


def _check_replacement(text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
    times = text.count(old) if old else len(text) + 1
    _check_size(len(text) + times * len(new))
