"""Where prompt templates run: jinja2's sandbox with a meter.

jinja2 keeps a template, a stranger's program, from reaching anything; the meter keeps it from
taking all time and memory. Every value that it makes is counted, and every loop, call and
comparison looks at the clock; what may grow is measured before. A caller may set the ceilings.
"""

import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, KeysView, ValuesView
from datetime import datetime
from functools import reduce, wraps
from types import BuiltinMethodType, GeneratorType
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, ext, nodes, pass_context, runtime, sandbox, utils
from jinja2.filters import do_round, make_attrgetter
from jinja2.parser import Parser
from jinja2.visitor import NodeTransformer

from ..errors import ModelError

TEMPLATE_SECONDS = 5.0  # one rendering
TEMPLATE_SIZE = 2**26  # characters that one rendering makes; an element of a list counts as ELEMENT
TEMPLATE_SOURCE = 2**17  # characters of the template itself; the longest known has 30,000
ELEMENT = 16
INTEGER_BITS = 2**14

LISTS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)
GROWING = {  # filters and methods whose result, or work, may be their value times an argument
    "batch", "center", "expandtabs", "groupby", "indent", "join", "list", "ljust", "lstrip",
    "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "slice",
    "sort", "split", "splitlines", "strip", "to_bytes", "tojson", "translate", "trim", "zfill",
}  # fmt: skip
QUADRATIC = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")  # of no use in a prompt
TOO_LARGE = "it makes too much text"
FIELD_IN_FIELD = re.compile(r"%[^%a-zA-Z]*\*|\{[^{}]*:[^{}]*\{")  # a width from the values


class Overrun(ModelError):
    """A template went past a ceiling."""


class Meter(sandbox.ImmutableSandboxedEnvironment):
    """An environment that compiles templates so that they count what they do."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, ext.loopcontrols],
            optimized=False,  # nothing is computed while compiling
            finalize=pass_context(lambda _, value: self.printed(value)),
        )
        for name in QUADRATIC:
            del self.filters[name]
        self.filters |= {"round": self.round, "sum": self.sum, "tojson": self.to_json}
        filters: dict[str, Callable[..., Any]] = self.filters
        self.filters = {name: self.counted(name, f) for name, f in filters.items()}
        self.filters |= {"_made": self.made, "_printed": self.printed, "_tick": self.tick}
        self.tests = {name: self.counted(name, f) for name, f in self.tests.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "namespace": _Namespace,
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.now().strftime(form[:1000]),
        }
        self.start()

    def start(self) -> None:
        """A rendering begins."""
        self.left, self.deadline = TEMPLATE_SIZE, time.monotonic() + TEMPLATE_SECONDS

    def compiled(self, source: str) -> Callable[..., str]:
        """The render function of a template. Raises what jinja2, or Python, finds wrong with it."""
        if len(source) > TEMPLATE_SOURCE:
            raise Overrun(f"it is longer than {TEMPLATE_SOURCE:,} characters")
        tree = _Metered().visit(self.parse(source))
        render = self.from_string(tree.set_environment(self)).render

        def run(**names: Any) -> str:
            self.start()
            return render(**names)

        return run

    # What a compiled template calls

    def tick(self, value: Any = True) -> Any:
        """`value`, if there is time."""
        if time.monotonic() > self.deadline:
            raise Overrun(f"it runs for more than {TEMPLATE_SECONDS:g} s")
        return value

    def made(self, value: Any) -> Any:
        """`value`, counted; what is evaluated as it is asked for is evaluated now."""
        self.tick()
        if isinstance(value, GeneratorType):
            items = []
            for item in value:
                self.spend(ELEMENT)
                items.append(self.made(item))
            self.weight(items)
            return iter(items)  # true and read once, as the generator was
        if isinstance(value, str | bytes):
            self.spend(len(value))
        elif isinstance(value, int):
            if value.bit_length() > INTEGER_BITS:
                raise Overrun("it makes a huge number")
        elif isinstance(value, (*LISTS, dict)):
            self.spend(ELEMENT * len(value))
            self.weight(value)
        return value

    def printed(self, value: Any) -> Any:
        """`value`, counted as the text that it becomes."""
        self.spend(self.weight(self.tick(value)))
        return value

    def spend(self, size: int) -> None:
        self.left -= size
        self.check(0)

    def check(self, size: int) -> None:
        """Raises Overrun where there is no room for `size` characters more."""
        if size > self.left:
            raise Overrun(TOO_LARGE)

    def weight(self, value: Any) -> int:
        """Characters in `value` all the way down, as often as each is in it."""
        total, waiting = 0, [value]
        while waiting:
            item = waiting.pop()
            total += ELEMENT
            if isinstance(item, str | bytes):
                total += len(item)
            elif isinstance(item, (*LISTS, dict)):
                self.tick()
                waiting += item
                if isinstance(item, dict):
                    waiting += item.values()
            if total + ELEMENT * len(waiting) > TEMPLATE_SIZE:
                raise Overrun(TOO_LARGE)
        return total

    # What may grow is measured before

    def grow(self, name: str, value: Any, others: Iterable[Any]) -> None:
        """Looks at the arguments of a filter or method."""
        if name in ("format", "format_map"):
            return self.fill(value, others)
        if name in GROWING:
            sizes = [abs(o) if isinstance(o, int) else self.weight(o) for o in others]
            self.check(self.weight(value) * max([ELEMENT, *sizes]))

    def fill(self, form: Any, values: Any) -> None:
        """Looks at a format string and its values."""
        text = str(form).replace("{{", "")
        widths = re.findall(r"\d+", text)
        if FIELD_IN_FIELD.search(text) or any(len(width) > 9 for width in widths):
            raise Overrun("it asks for an endless field")
        fields = 1 + text.count("%") + text.count("{")
        self.check(len(text) + fields * (self.weight(values) + max([0, *map(int, widths)])))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Part of jinja2's interface: every `+ * ** %`."""
        if operator == "%" and isinstance(left, str | bytes):
            self.fill(left, right)
        elif operator == "*":
            for a, b in ((left, right), (right, left)):
                if isinstance(a, int) and isinstance(b, str | bytes | list | tuple):
                    self.check(len(b) * a * (1 if isinstance(b, str | bytes) else ELEMENT))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self.made(1 << min(left.bit_length() * max(right, 0), INTEGER_BITS))  # as large
        return self.made(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Part of jinja2's interface: every call of a method, macro or global."""
        self.tick()
        method = getattr(obj, "__wrapped__", obj)  # jinja2 wraps str.format
        if isinstance(method, BuiltinMethodType):
            self.grow(method.__name__, method.__self__, [*args, *kwargs.values()])
        return self.made(super().call(context, obj, *args, **kwargs))

    def counted(self, name: str, function: Any) -> Callable[..., Any]:
        """A filter or test that looks before and counts after."""

        @wraps(function)  # also what jinja2 reads off it
        def counted(*args: Any, **kwargs: Any) -> Any:
            given = [a for a in args if not isinstance(a, INSIDE)] or [None]
            self.grow(name, given[0], [*given[1:], *kwargs.values()])
            return self.made(function(*args, **kwargs))

        return counted

    def sum(self, values: Iterable[Any], attribute: str | None = None, start: Any = 0) -> Any:
        """jinja2's, by operators that count: lists would be added in quadratic time."""
        if attribute is not None:
            values = map(make_attrgetter(self, attribute), values)
        return reduce(lambda a, b: self.call_binop(None, "+", a, b), values, start)

    def round(self, value: float, precision: int = 0, method: Any = "common") -> float:
        """jinja2's, whose 10**precision would never end."""
        return do_round(value, max(-99, min(precision, 99)), method)

    def to_json(self, value: Any, **options: Any) -> str:
        """As transformers has it: no HTML escapes."""
        pieces = []
        for piece in json.JSONEncoder(**{"ensure_ascii": False} | options).iterencode(value):
            self.spend(len(piece))
            pieces.append(piece)
        return "".join(pieces)


INSIDE = (runtime.Context, nodes.EvalContext, Environment)  # what jinja2 hands to filters in front


class _Metered(NodeTransformer):
    """Puts the counting into a template's tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_through("_tick", nodes.Const(True))))
        if node.test is not None:
            node.test = nodes.And(_through("_tick", nodes.Const(True)), node.test)
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        """As an expression, which is counted when it is printed."""
        return nodes.MarkSafeIfAutoescape(nodes.Const(node.data))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_through("_printed", part) for part in node.nodes]
        return node

    def visit_literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        target = getattr(node, "ctx", "load") != "load"
        return node if target else _through("_made", node)

    visit_List = visit_Tuple = visit_Dict = visit_Compare = visit_literal

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _through("_made", node) if isinstance(node.arg, nodes.Slice) else node


def _through(name: str, node: nodes.Expr) -> nodes.Expr:
    """`node`, given to one of the meter's functions."""
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(ext.Extension):
    """{% generation %} marks answers for training; here its body is simply printed."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Scope:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(utils.Namespace):
    """jinja2's, whose text does not hold what it holds: nothing can be weighed in it."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
