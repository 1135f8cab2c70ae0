"""The checkpoint's own chat template, run as what it is: a program from an untrusted file.

A chat template is a Jinja program that ships with the weights. It runs here in jinja2's
`ImmutableSandboxedEnvironment`, which keeps it away from Python's internals; that alone does not keep it from burning
all time and memory. So the language is also *metered*: a transformation of the syntax tree and the sandbox's own hooks
charge every loop step, call, filter, operator, copy and printed piece to one account (`_Account`) with three limits:

- work: one unit per character that is produced, ten per item and per step;
- the size of a single value, counted with everything inside it (also the size of the result);
- seconds, looked at on every charge.

What could produce much from little (`'x' * 10**9`, `10**10**10`, `join`, `replace`) is charged before it runs; what
has no place in chat templates and is hard to bound (`'%999d' % x`, `str.format`, `center`, `indent`, ...) is absent:
filters, methods and globals are lists of what is allowed. Between two charges only work proportional to the size of
the template and of one value is possible, so the limit of seconds is kept to within that. Not covered: the time to
compile a template, which is bounded only by the limit on its length.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from .errors import BundleError, PromptError
from .sources import one_line

__all__ = ["MAX_SECONDS", "MAX_SOURCE_CHARACTERS", "ChatTemplate"]

MAX_SOURCE_CHARACTERS = 262_144  # ten times the longest chat template seen
MAX_SECONDS = 5.0  # a real template needs a few milliseconds

_VALUE_FLOOR, _VALUE_FACTOR = 1_000_000, 4  # largest value in characters and items: floor + factor * size of the input
_WORK_FACTOR = 32  # work in units: factor * largest value
_STEP = 10  # units for a step that produces nothing; the least that Python allocates for one
_INTEGER_BITS = 4096
_SHOWN = 300  # what a template says when it refuses is for people

# fmt: off
_FILTERS = frozenset((
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last", "length",
    "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "title",
    "trim", "unique", "upper",
))
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset((
        "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower", "isspace",
        "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind",
        "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
    )),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
}
# fmt: on
_REFUSED_STATEMENTS = (
    nodes.Extends,
    nodes.Include,
    nodes.Import,
    nodes.FromImport,
    nodes.Block,
    nodes.ScopedEvalContextModifier,  # {% autoescape %}
)
_CONTAINERS = (list, tuple, set, frozenset, dict, type({}.keys()), type({}.values()), type({}.items()))
_SIZED = (str, *_CONTAINERS)


class ChatTemplate:
    """A compiled chat template.

    `source` is the text of `chat_template.jinja`. Raises BundleError when it does not compile, is longer than
    MAX_SOURCE_CHARACTERS or uses a filter that is not offered here. Safe to use from several threads (renders take
    turns).
    """

    def __init__(self, source: str):
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise BundleError(
                f"the chat template has {len(source)} characters, the limit is {MAX_SOURCE_CHARACTERS} characters"
            )
        self.source = source
        self._environment = _MeteredEnvironment()
        self._lock = threading.Lock()
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # also RecursionError, or ValueError for a number of 5,000 digits
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise BundleError(f"the chat template does not compile{line}: {one_line(error, _SHOWN)}") from None

    def render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """Render a conversation.

        `messages` is what transformers' `apply_chat_template` takes: dicts with "role" and "content", the content a
        string or a list of {"type": "text", "text": ...} and {"type": "image"}. `variables` are the other names a
        template may read (`bos_token`, `add_generation_prompt`, ...). Raises PromptError, in one line, with the
        message of `raise_exception`, for any error inside the template, and when a limit is reached.
        """
        with self._lock:
            self._environment.account = account = _Account(_size([messages, variables]))
            try:
                text = self._template.render(messages=messages, **variables)
                account.check(text)
            except Exception as error:  # whatever an untrusted program can raise, RecursionError included
                raise PromptError(f"the chat template refused the conversation: {one_line(error, _SHOWN)}") from None
        return text


class _Refused(jinja2.TemplateError):
    """A limit was reached, or the template called `raise_exception`."""


class _Account:
    """What one render may still spend. `given` is the size of its input in characters and items."""

    def __init__(self, given: int):
        self.largest = _VALUE_FLOOR + _VALUE_FACTOR * given
        self.left = _WORK_FACTOR * self.largest
        self.deadline = time.monotonic() + MAX_SECONDS

    def spend(self, units: int = _STEP) -> None:
        """Charge `units` of work before it is done."""
        self.left -= units
        if self.left < 0:
            raise _Refused("the template does too much work for this conversation")
        if time.monotonic() > self.deadline:
            raise _Refused(f"the template runs for more than {MAX_SECONDS:g} seconds")

    def check(self, value: Any) -> None:
        """Refuse a value that is too large, counted with everything inside it."""
        if isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
            raise _Refused(f"the template computes a number of more than {_INTEGER_BITS} bits")
        if isinstance(value, _SIZED) and _size(value, self.largest) > self.largest:
            raise _Refused(f"the template makes a value of more than {self.largest} characters")

    def made(self, value: Any) -> Any:
        """Charge and check a value that was just made; returns it."""
        self.check(value)
        self.spend(_STEP + _cost(value))
        return value

    def text(self, value: Any) -> str:
        """The value as Jinja prints it."""
        self.check(value)
        return str(value)


def _size(value: Any, stop_above: float = float("inf")) -> int:
    """Characters and items in `value` and everything inside it; the count ends early above `stop_above`.

    A shared part counts each time it is reached: that is what comparing or printing the value would cost.
    """
    total, stack = 0, [value]
    while stack and total <= stop_above:
        item = stack.pop()
        total += 1
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, _CONTAINERS):
            stack.extend(item)
    return total


def _cost(value: Any) -> int:
    """Units for a copy of `value`: the characters of a string, the slots of a container."""
    return len(value) if isinstance(value, str) else _STEP * len(value) if isinstance(value, _CONTAINERS) else 0


class _MeteredNamespace(Namespace):
    """`namespace()` without names that Python gives a meaning, and without printing what it holds."""

    def __init__(self, *initial: Any, **attributes: Any):
        Namespace.__init__(self)
        for name, value in dict(*initial, **attributes).items():
            _MeteredNamespace.__setitem__(self, name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise _Refused(f"a namespace cannot hold {name!r}")
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<namespace>"


class _Metering(NodeTransformer):
    """Rewrites a syntax tree so that what the sandbox has no hook for passes through a filter of ours."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through("_steps", cast(nodes.Expr, node.iter))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        # Literal text would bypass `finalize`, where printed characters are charged; constants do not.
        self.generic_visit(node)
        node.nodes = [
            nodes.Const(child.data, lineno=child.lineno) if isinstance(child, nodes.TemplateData) else child
            for child in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through("_concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _through("_made", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _through("_made", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _through("_made", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _through("_made", node) if node.ctx == "load" else node  # otherwise the target of an assignment


def _through(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _MeteredEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with an account. `account` belongs to the one render that holds the lock of the ChatTemplate."""

    account: _Account
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            optimized=False,  # the optimiser would compute constants while compiling, outside of any account
            finalize=self._print,
        )
        self.account = _Account(0)
        own: dict[str, Callable] = {
            "join": self._join,
            "replace": self._replace,
            "string": lambda value: self.account.text(value),
            "tojson": self._tojson,
            "_concat": lambda pieces: self._join(pieces),
        }
        known = {name: self.filters[name] for name in _FILTERS} | own
        self.filters = {name: self._metered(function) for name, function in known.items()}
        self.filters["_steps"] = self._steps
        self.filters["_made"] = lambda value: self.account.made(value)
        self.globals = {
            "range": self.globals["range"],  # the sandbox's own: at most 100,000 items
            "dict": dict,
            "namespace": _MeteredNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
        """Jinja's hook between parsing and code generation."""
        for refused in (node for kind in _REFUSED_STATEMENTS for node in source.find_all(kind)):
            name = type(refused).__name__.lower()
            raise jinja2.TemplateSyntaxError(f"a chat template cannot use '{name}'", refused.lineno)
        return super()._generate(_Metering().visit(source), *arguments, **options)

    # -- hooks of the sandbox ------------------------------------------------------------------------------------

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if type(obj) in (_MeteredNamespace, LoopContext):  # `type`, because templates ask this most of all
            return not attr.startswith("_")
        return attr in _METHODS.get(type(obj), ())

    def wrap_str_format(self, value: Any) -> None:
        """Jinja would offer `str.format` here; it stays a method like any other, and is not on the list."""

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        account = __self.account
        account.spend()
        for value in args:
            account.check(value)
        for name, value in kwargs.items():
            if not name.startswith("_"):  # Jinja passes its own `_loop_vars`
                account.check(value)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and __obj.__name__ == "replace":
            return account.made(__self._replace(owner, *args, **kwargs))
        if isinstance(owner, str) and __obj.__name__ == "join":
            return account.made(__self._join(*args, d=owner))
        return account.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        account = self.account
        account.check(left)
        account.check(right)
        if operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, type(left)):
            account.spend(_cost(left) + _cost(right))
        elif operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
                    account.spend(_cost(sequence) * max(count, 0))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * max(right, 0) > _INTEGER_BITS:
                raise _Refused(f"the template computes a number of more than {_INTEGER_BITS} bits")
        elif operator == "%" and isinstance(left, str):
            raise _Refused("the template formats a string with '%', which is not offered")
        return account.made(super().call_binop(context, operator, left, right))

    # -- filters -------------------------------------------------------------------------------------------------

    def _metered(self, function: Callable) -> Callable:
        @functools.wraps(function)  # also copies the mark of pass_context and pass_environment
        def metered(*arguments: Any, **options: Any) -> Any:
            for value in (*arguments, *options.values()):
                self.account.check(value)
            return self.account.made(function(*arguments, **options))

        return metered

    def _steps(self, items: Iterable) -> Iterator:
        for item in items:
            self.account.spend()
            yield item

    @pass_context  # the mark keeps Jinja from printing constants while compiling
    def _print(self, context: Context, value: Any) -> str:
        text = self.account.text(value)
        self.account.spend(_STEP + len(text))
        return text

    def _join(self, items: Iterable, d: str = "") -> str:
        pieces = [self.account.text(item) for item in items]
        self.account.spend(sum(map(len, pieces)) + len(d) * len(pieces))
        return d.join(pieces)

    def _replace(self, s: str, old: str, new: str, count: int = -1) -> str:
        text = self.account.text(s)
        places = text.count(old)
        self.account.spend(len(text) + len(new) * (places if count < 0 else min(places, count)))
        return text.replace(old, new, count)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as transformers' `tojson` writes it: nothing escaped for HTML."""
        if (indent is not None and not (isinstance(indent, int) and 0 <= indent <= 8)) or _size(separators, 16) > 16:
            raise _Refused("tojson takes an indent of at most 8 and short separators")
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        pieces = []
        for piece in encoder.iterencode(value):
            self.account.spend(len(piece))
            pieces.append(piece)
        return "".join(pieces)


def _raise_exception(message: Any) -> None:
    raise _Refused(message)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100:
        raise _Refused("strftime_now takes a format of at most 100 characters")
    return datetime.now().strftime(pattern)
