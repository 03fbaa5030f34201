"""What two guarantees share by mistake, found before Kafka is touched.

A topic is read, and a table is written, under one guarantee. These mistakes are looked for:

- a topic that agents of two apps read;
- an agent of one app that reads a topic declared on another, whose consumer would then fetch it;
- a table whose name two apps declare;
- an agent that writes a table of another app. To read one is allowed: committed values are seen.

Writes are found without running anything, in the source of the agent and of the functions of the user's own that it calls.
A table counts only if a name leads to the very object: a global, an enclosing function's variable, an attribute of a module
or of such an object, an argument of a followed call. What takes another way, and what has no source (a REPL), is not found
here; the table itself refuses such a write when it happens.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from faust.types import TopicT
from faust.types.tables import TableT, WindowWrapperT

from streams_app.errors import ConfigurationError

if TYPE_CHECKING:
    from streams_app.application import App

_WRITING_METHODS = frozenset({"update", "pop", "popitem", "setdefault", "clear"})
_ENGINE = __name__.partition(".")[0]
_STDLIB = sysconfig.get_path("stdlib")
_Definition: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


def check_overlaps(apps: Sequence[App]) -> None:
    """Refuse a family of apps in which two guarantees read one topic or write one table; see the module.

    Raises:
        ConfigurationError: with a sentence for each mistake, which names both places.
    """
    source = _Source({_package(agent.fun) for app in apps for agent in app.agents.values()})
    agents = [_examined(app, name, agent, source) for app in apps for name, agent in app.agents.items()]
    mistakes = [
        *_topics_read_twice(apps, agents),
        *_topics_of_others(apps, agents),
        *_tables_declared_twice(apps, source),
        *_foreign_writes(apps, agents, source),
    ]
    if mistakes:
        raise ConfigurationError("\n".join(mistakes))


@dataclass
class _Examined:
    """An agent, and what its code does."""

    app: App
    name: str
    place: str
    #: Whole names of topics, and the texts of patterns.
    reads: set[str] = field(default_factory=set)
    patterns: list[Any] = field(default_factory=list)
    #: By ``id()``, as equal tables are not one: tables, each with the first place that writes it.
    writes: dict[int, tuple[Any, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"agent {self.name} ({self.place})"

    def may_read(self, topic: str) -> bool:
        """Whether the agent reads it, by name or by pattern."""
        return topic in self.reads or any(pattern.match(topic) for pattern in self.patterns)

    def add_channel(self, channel: Any) -> None:
        """Note what is read from a topic; a channel in memory has no names."""
        self.reads.update(getattr(channel, "topics", None) or ())
        pattern = getattr(channel, "pattern", None)
        if pattern is not None:
            self.reads.add(pattern.pattern)
            self.patterns.append(pattern)


def _examined(app: App, name: str, agent: Any, source: _Source) -> _Examined:
    code = getattr(inspect.unwrap(agent.fun), "__code__", None)
    place = "no source" if code is None else _place(code.co_filename, code.co_firstlineno)
    examined = _Examined(app, name, place)
    examined.add_channel(agent.channel)
    for thing, used_at in source.uses(agent.fun):
        if isinstance(thing, str):
            examined.reads.add(thing)
        elif isinstance(thing, TopicT):
            examined.add_channel(thing)
        else:
            examined.writes.setdefault(id(thing), (thing, used_at))
    return examined


def _topics_read_twice(apps: Sequence[App], agents: Sequence[_Examined]) -> Iterator[str]:
    known = {*chain.from_iterable(agent.reads for agent in agents), *chain.from_iterable(app.declared for app in apps)}
    for topic in sorted(known):
        readers: dict[str, _Examined] = {}
        for agent in agents:
            if agent.may_read(topic):
                readers.setdefault(agent.app.conf.id, agent)
        if len(readers) > 1:
            places = _and(f"by {agent} {_words(agent.app)}" for agent in readers.values())
            yield (
                f"topic {topic} is read under more than one guarantee: {places}. Each of them would handle every event; "
                "read the topic under one guarantee, and let that agent send what the other needs to a topic of its own."
            )


def _topics_of_others(apps: Sequence[App], agents: Sequence[_Examined]) -> Iterator[str]:
    for agent in agents:
        channel = agent.app.agents[agent.name].channel
        if channel.app is not agent.app and channel.app in apps:
            yield (
                f"{agent} runs {_words(agent.app)}, but {channel} was declared {_words(channel.app)}, whose consumer would "
                "fetch it. Declare the topic on the app of the agent that reads it."
            )


def _tables_declared_twice(apps: Sequence[App], source: _Source) -> Iterator[str]:
    by_name: dict[str, list[Any]] = {}
    for app in apps:
        for name, table in app.tables.items():
            by_name.setdefault(name, []).append(table)
    for name, tables in by_name.items():
        if len(tables) > 1:
            places = _and(f"{source.declaration(table)} {_words(table.app)}" for table in tables)
            yield (
                f"table {name} is declared under more than one guarantee: {places}. "
                "People and the audit tell tables by their names; give one of them another name."
            )


def _foreign_writes(apps: Sequence[App], agents: Sequence[_Examined], source: _Source) -> Iterator[str]:
    registered = {id(table) for app in apps for table in app.tables.values()}
    for agent in agents:
        for table, place in agent.writes.values():
            if table.app is agent.app or id(table) not in registered:
                continue
            owners = [f"written by {each}" for each in agents if each.app is table.app and id(table) in each.writes]
            home = ", ".join([f"declared as {source.declaration(table)}", *owners[:1]])
            yield (
                f"{agent} runs {_words(agent.app)}, but writes, at {place}, table {table.name}, which is kept "
                f"{_words(table.app)}: {home}. A table is written under one guarantee; send an event to an agent that runs "
                f"{_words(table.app)}, and let it write."
            )


class _Call(NamedTuple):
    """A call to look into; an argument whose value is not known is None."""

    callee: Any
    arguments: Sequence[Any] = ()
    keywords: Mapping[str, Any] = {}


class _Source:
    """The source of loaded modules. ``packages``: the top-level ones whose functions are followed wherever they lie."""

    def __init__(self, packages: set[str]) -> None:
        self._packages = packages
        self._trees: dict[str, ast.Module] = {}
        self._definitions: dict[str, dict[int, _Definition]] = {}

    def uses(self, fun: Any) -> Iterator[tuple[Any, str]]:
        """What a function, and those that it calls, do: tables written and topics read by a stream, each with its place.

        A topic that is given to ``through`` by name comes as text.
        """
        waiting = [_Call(fun)]
        seen = set()
        while waiting:
            call = waiting.pop()
            # A decorator's function stands for the decorated one; both may write.
            wrapped = inspect.getattr_static(call.callee, "__wrapped__", None)
            if wrapped is not None:
                waiting.append(_Call(wrapped))
            function = _Function.of(call)
            if function is None or function.key in seen or not (call.callee is fun or self._is_own(function.fun)):
                continue
            seen.add(function.key)
            definition = self._definition(function.fun.__code__)
            if definition is not None:
                function.names.update(_bound_names(definition))
                for node in chain.from_iterable(ast.walk(statement) for statement in definition.body):
                    if isinstance(node, ast.Subscript | ast.Call):
                        for used in _used(node, function):
                            yield used, _place(function.fun.__code__.co_filename, node.lineno)
                    if isinstance(node, ast.Call):
                        waiting.append(function.call(node))

    def declaration(self, table: Any) -> str:
        """Where a table is declared: its global and the line; as far as they can be found, else the app's id."""
        holders = [
            (module, name)
            for module in list(sys.modules.values())
            if isinstance(module, ModuleType)
            for name, value in list(vars(module).items())
            if _table_of(value) is table
        ]
        for module, name in holders:
            # A module that imported the table holds it, too; the one that assigns it declares it.
            file = getattr(module, "__file__", None)
            line = None if file is None else _assignment(self._tree(file), name)
            if file is not None and line is not None:
                return f"{module.__name__}.{name} ({_place(file, line)})"
        for module, name in holders:
            return f"{module.__name__}.{name}"
        return f"a table of {table.app.conf.id}"

    def _is_own(self, fun: FunctionType) -> bool:
        """Whether somebody wrote the function for this application."""
        package, file = _package(fun), fun.__code__.co_filename
        if package in self._packages:
            return True
        parts = Path(file).parts
        is_library = "site-packages" in parts or "dist-packages" in parts or Path(file).is_relative_to(_STDLIB)
        return package != _ENGINE and not is_library

    def _tree(self, file: str) -> ast.Module:
        if file not in self._trees:
            try:
                self._trees[file] = ast.parse("".join(linecache.getlines(file)))
            except (SyntaxError, ValueError):
                # The file was changed since it was loaded: it does not say what runs.
                self._trees[file] = ast.Module([], [])
        return self._trees[file]

    def _definition(self, code: CodeType) -> _Definition | None:
        file = code.co_filename
        if file not in self._definitions:
            self._definitions[file] = {
                min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]): node
                for node in ast.walk(self._tree(file))
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            }
        definition = self._definitions[file].get(code.co_firstlineno)
        return definition if definition is not None and definition.name == code.co_name else None


@dataclass
class _Function:
    """A function that is looked into: its names, and what those stand for, as far as that is known."""

    fun: FunctionType
    arguments: Mapping[str, Any]
    #: How often the function, or one inside it, binds each name of its own.
    names: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, call: _Call) -> _Function | None:
        """None: what is called is no Python function."""
        method = call.callee if isinstance(call.callee, MethodType) else None
        fun = call.callee if method is None else method.__func__
        arguments = call.arguments if method is None else [method.__self__, *call.arguments]
        if not isinstance(fun, FunctionType):
            return None
        code = fun.__code__
        named = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        known = dict(zip(named[: code.co_argcount], arguments, strict=False))
        known |= {name: value for name, value in call.keywords.items() if name in named}
        # A bound method is made anew at every look, so that recursion would never meet the same call again.
        return cls(fun, {name: value for name, value in known.items() if not isinstance(value, MethodType)})

    @property
    def key(self) -> tuple[FunctionType, frozenset[tuple[str, int]]]:
        """The same for a call that does the same."""
        return self.fun, frozenset((name, id(value)) for name, value in self.arguments.items())

    def value(self, expression: ast.expr | None) -> Any:
        """The object that a name, or names with dots, lead to; None: not known."""
        match expression:
            case ast.Name(id=name) if name in self.names:
                # An argument that is bound again, here or in a function inside, may be something else by then.
                return self.arguments.get(name) if self.names[name] == 1 else None
            case ast.Name(id=name) if name in self.fun.__code__.co_freevars:
                assert self.fun.__closure__ is not None
                return _content(self.fun.__closure__[self.fun.__code__.co_freevars.index(name)])
            case ast.Name(id=name):
                return self.fun.__globals__.get(name)
            case ast.Attribute(value=owner, attr=name):
                found = self.value(owner)
                return None if found is None else _attribute(found, name)
        return None

    def call(self, node: ast.Call) -> _Call:
        """A call in the function's body."""
        plain = takewhile(lambda argument: not isinstance(argument, ast.Starred), node.args)
        return _Call(
            self.value(node.func),
            [self.value(argument) for argument in plain],
            {keyword.arg: self.value(keyword.value) for keyword in node.keywords if keyword.arg},
        )


def _assignment(tree: ast.Module, name: str) -> int | None:
    """The line on which a module assigns to one of its globals."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=bound)]) | ast.AnnAssign(target=ast.Name(id=bound)) if bound == name:
                return node.lineno
    return None


def _used(node: ast.expr, function: _Function) -> Iterator[Any]:
    """The table that a piece of code writes, or the topic that it makes a stream read."""
    match node:
        case ast.Subscript(value=owner, ctx=ast.Store() | ast.Del()):
            table = _table_of(function.value(owner))
        case ast.Call(func=ast.Attribute(value=owner, attr=method)) if method in _WRITING_METHODS:
            table = _table_of(function.value(owner))
        case ast.Call(func=ast.Attribute(value=owner, attr="through" | "group_by" as method)):
            given = node.args[:1] if method == "through" else []
            for expression in [*given, *(word.value for word in node.keywords if word.arg in {"channel", "topic"})]:
                if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
                    # A stream is a function's own; anything else may have a method of that name.
                    if function.value(owner) is None:
                        yield expression.value
                elif isinstance(topic := function.value(expression), TopicT):
                    yield topic
            return
        case _:
            return
    if table is not None:
        yield table


def _bound_names(definition: _Definition) -> Iterator[str]:
    """All names that a function and those inside it bind, once for each time."""
    for node in ast.walk(definition):
        match node:
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                yield name
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield name
            case ast.MatchMapping(rest=str(name)):
                yield name
            case ast.alias(name=name, asname=other):
                yield other or name.partition(".")[0]
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                if node is not definition:
                    yield name


def _attribute(owner: Any, name: str) -> Any:
    """As ``getattr``, but without running anything of the owner's."""
    found = inspect.getattr_static(owner, name, None)
    if isinstance(found, staticmethod):
        return found.__func__
    if isinstance(found, classmethod):
        return MethodType(found.__func__, owner if isinstance(owner, type) else type(owner))
    if isinstance(found, FunctionType) and inspect.getattr_static(type(owner), name, None) is found:
        return MethodType(found, owner)
    return found


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned yet
        return None


def _table_of(value: Any) -> Any:
    """The table, out of its window if it has one; None: it is none."""
    # Not isinstance(): a proxy might act when it is asked for its class.
    if issubclass(type(value), WindowWrapperT):
        value = value.table
    return value if issubclass(type(value), TableT) else None


def _package(fun: Any) -> str:
    return str(getattr(fun, "__module__", None) or "").partition(".")[0]


def _place(file: str, line: int) -> str:
    path = Path(file)
    return f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}:{line}"


def _words(app: App) -> str:
    return app.guarantee.replace("_", " ")


def _and(parts: Iterable[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}"
