"""What two guarantees share by mistake is refused at start; what they may share is not."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import agents
from streams_app import app
from streams_app.errors import ConfigurationError
from streams_app.overlaps import check_overlaps

APPS = """
from pathlib import Path
from streams_app.application import App
from streams_app.settings import Settings

settings = Settings(kafka_url="kafka://127.0.0.1:1", datadir=Path("data"))
money = App("shop", settings=settings, autodiscover=False, web_enabled=False)
counting = money.sibling("at_least_once")
sensing = money.sibling("at_most_once")
payments = money.topic("payments", key_type=str, value_type=int)
visits = counting.topic("visits", key_type=str, value_type=int)
"""
TABLES = """
from faust.tables.wrappers import WindowWrapper
from shop_apps import counting, money

views = counting.Table("views", key_type=str, value_type=int, default=int)
minutes = WindowWrapper(counting.Table("minutes", key_type=str, value_type=int, default=int))
balances = money.Table("balances", key_type=str, value_type=int, default=int)

def count(page):
    views[page] += 1

async def later(page):
    for _ in range(3):
        count(page)

def bump(table, page):
    table[page] = table[page] + 1

def bump_another(table, page):
    table = {}
    table[page] = 1

def again(depth, page):
    if depth:
        again(depth - 1, page)
    views.pop(page)

class Counter:
    def __init__(self, table):
        self.table = table

    @property
    def trap(self):
        raise AssertionError("a check at start must not run anything of the user's")

    def add(self, page):
        self._add(page)

    def _add(self, page):
        self.table[page] += 1

    @classmethod
    def made(cls, page):
        cls.shared[page] = 1

    @staticmethod
    def fixed(page):
        views[page] = 1

Counter.shared = views
counter = Counter(views)
own_counter = Counter(balances)
"""
AGENTS = """
import asyncio
import functools
import shop_tables
import shop_tables as t
from shop_apps import counting, money, payments, sensing, visits
from shop_tables import again, balances, bump, bump_another, count, counter, later, minutes, own_counter, views
from shop_tables import views as renamed
"""
#: An agent of the app that takes payments, with a line of its own to try.
PAY = """
@money.agent(payments)
async def pay(stream):
    async for key, amount in stream.items():
        {}
"""


class Shop:
    """A user's application in files of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name, text in {"shop_apps": APPS, "shop_tables": TABLES}.items():
            (folder / f"{name}.py").write_text(text)

    def load(self, *agents: str) -> ModuleType:
        """Import the application with these agents."""
        (self._folder / "shop_agents.py").write_text(AGENTS + "\n".join(agents))
        importlib.invalidate_caches()
        return importlib.import_module("shop_agents")

    def check(self, *agents: str) -> None:
        """The check at start."""
        check_overlaps(self.load(*agents).money.family)

    def refused(self, *agents: str) -> str:
        """The sentence that the check at start refuses with."""
        with pytest.raises(ConfigurationError) as refused:
            self.check(*agents)
        return refused.value.format_message()

    def place(self, module: str, text: str) -> str:
        """``file:line`` of the first line that has ``text``."""
        lines = (self._folder / f"{module}.py").read_text().splitlines()
        return f"{module}.py:{next(number for number, line in enumerate(lines, 1) if text in line)}"


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield Shop(tmp_path)
    for name in ("shop_apps", "shop_tables", "shop_agents", "shop_library"):
        sys.modules.pop(name, None)


# Topics


def test_a_topic_read_under_two_guarantees_is_refused(shop: Shop) -> None:
    """Every payment would be handled twice, once of them under a guarantee that nobody chose for it."""
    text = shop.refused(
        PAY.format("pass"), "@counting.agent(counting.topic('payments'))\nasync def copy(stream):\n    pass"
    )
    assert text.startswith("topic payments is read under more than one guarantee: ")
    assert f"by agent shop_agents.pay ({shop.place('shop_agents', '@money.agent')}) exactly once" in text
    assert f"by agent shop_agents.copy ({shop.place('shop_agents', '@counting.agent')}) at least once" in text
    assert "let that agent send" in text


@pytest.mark.parametrize(
    "channel", ["counting.topic(pattern='^pay.*')", "counting.topic('other', 'payments')", "'payments'"]
)
def test_a_topic_is_found_by_pattern_and_among_several(shop: Shop, channel: str) -> None:
    """The overlap is the same, however it was written."""
    text = shop.refused(PAY.format("pass"), f"@counting.agent({channel})\nasync def copy(stream):\n    pass")
    assert "topic payments is read under more than one guarantee" in text


def test_the_same_pattern_under_two_guarantees_is_refused(shop: Shop) -> None:
    """No topic has to be known for that."""
    agent = "@{0}.agent({0}.topic(pattern='^logs-.*'))\nasync def read_{0}(stream):\n    pass"
    text = shop.refused(agent.format("money"), agent.format("sensing"))
    assert "topic ^logs-.* is read under more than one guarantee" in text
    assert "read_sensing" in text


@pytest.mark.parametrize(
    "step",
    [
        "stream.through('payments')",
        "stream.filter(bool).through(channel='payments')",
        "stream.through(payments)",
        "stream.group_by(len, name='n', topic=payments)",
    ],
)
def test_a_topic_that_a_stream_goes_through_counts(shop: Shop, step: str) -> None:
    """The agent reads it as well, though its decorator does not say so."""
    agent = f"@counting.agent(visits)\nasync def visit(stream):\n    async for _ in {step}:\n        pass"
    assert "topic payments is read under more than one guarantee" in shop.refused(PAY.format("pass"), agent)


def test_topics_may_be_shared_where_no_two_guarantees_read_them(shop: Shop) -> None:
    """Sending to another guarantee is how guarantees meet; two agents of one read as one."""
    shop.check(
        PAY.format("await visits.send(key=key, value=1)"),
        "@money.agent(payments)\nasync def look(stream):\n    pass",
        "@counting.agent(visits)\nasync def visit(stream):\n    await payments.send(key='k', value=1)",
        "@money.agent()\nasync def own(stream):\n    pass",
        "@counting.agent(name='shop_agents.own')\nasync def own(stream):\n    pass",
        "@counting.agent(counting.channel())\nasync def memory(stream):\n    pass",
        "@sensing.agent(sensing.channel())\nasync def memory2(stream):\n    pass",
    )


# Names of tables


def test_two_tables_of_one_name_are_refused(shop: Shop) -> None:
    """The audit, the metrics and people tell tables by name: one would be taken for the other."""
    text = shop.refused("sums = sensing.Table('views', default=int)")
    assert text.startswith("table views is declared under more than one guarantee: ")
    assert f"shop_tables.views ({shop.place('shop_tables', 'views =')}) at least once" in text
    assert f"shop_agents.sums ({shop.place('shop_agents', 'sums =')}) at most once" in text
    assert "give one of them another name" in text


def test_a_window_does_not_hide_a_tables_name(shop: Shop) -> None:
    """The global holds the window, the app the table."""
    text = shop.refused("sums: object = sensing.Table('minutes', default=int)")
    assert f"shop_tables.minutes ({shop.place('shop_tables', 'minutes =')})" in text
    assert f"shop_agents.sums ({shop.place('shop_agents', 'sums:')})" in text


def test_a_table_that_no_global_holds_is_named_by_its_app(shop: Shop) -> None:
    """There is no better place to name."""
    assert "a table of shop-at-most-once at most once" in shop.refused("sensing.Table('views', default=int)")


# Writes


@pytest.mark.parametrize(
    "write",
    [
        "views[key] = 1",
        "views[key] += 1",
        "del views[key]",
        "views.update({key: 1})",
        "views.pop(key)",
        "views.popitem()",
        "views.setdefault(key, 1)",
        "views.clear()",
        "views[key], other = 1, 2",
        "[views.pop(each) for each in key]",
        "minutes[key] += 1",
        "minutes[key] = 1",
        "renamed[key] = 1",
        "shop_tables.views[key] = 1",
        "t.counter.table[key] = 1",
        "count(key)",
        "shop_tables.count(key)",
        "await later(key)",
        "asyncio.ensure_future(later(key))",
        "bump(views, key)",
        "bump(page=key, table=t.views)",
        "counter.add(key)",
        "t.Counter.made(key)",
        "counter.made(key)",
        "counter.fixed(key)",
        "again(3, key)",
    ],
)
def test_an_agent_that_writes_a_table_of_another_guarantee_is_refused(shop: Shop, write: str) -> None:
    """The write would be a part of no commit of the table's own app: a restore would not know it."""
    text = shop.refused(PAY.format(write), "@counting.agent(visits)\nasync def visit(stream):\n    later('page')")
    place = shop.place("shop_agents", "@money.agent")
    assert text.startswith(f"agent shop_agents.pay ({place}) runs exactly once, but writes, at shop_")
    assert "which is kept at least once: declared as shop_tables." in text
    if "minutes" not in write:
        assert f"declared as shop_tables.views ({shop.place('shop_tables', 'views =')})" in text
        assert f"written by agent shop_agents.visit ({shop.place('shop_agents', '@counting.agent')})" in text


def test_the_line_that_writes_is_named(shop: Shop) -> None:
    """It may lie in a function that the agent only calls."""
    text = shop.refused(PAY.format("await later(key)"))
    assert f"at {shop.place('shop_tables', 'views[page] += 1')}, table views" in text


@pytest.mark.parametrize(
    "agent",
    [
        # A closure, with a table that no global holds.
        """
def make(mine):
    @money.agent(payments)
    async def pay(stream):
        mine['k'] = 1

make(views)
""",
        # A function inside, and one that was decorated.
        """
@money.agent(payments)
async def pay(stream):
    def inner():
        views['k'] = 1
    inner()
""",
        """
@functools.lru_cache
def cached(page):
    views[page] = 1

@money.agent(payments)
async def pay(stream):
    cached('k')
""",
        # The agent itself is decorated; what is written lies in it, or in the decorator.
        """
def logged(fun):
    @functools.wraps(fun)
    async def wrapper(stream):
        await fun(stream)
    return wrapper

@money.agent(payments)
@logged
async def pay(stream):
    views['k'] = 1
""",
        """
def counted(fun):
    @functools.wraps(fun)
    async def wrapper(stream):
        views['calls'] += 1
        await fun(stream)
    return wrapper

@money.agent(payments)
@counted
async def pay(stream):
    pass
""",
        # A text whose lines begin further left than the code.
        """
if True:
    @money.agent(payments)
    async def pay(stream):
        text = '''
left
'''
        views[text] = 1
""",
    ],
    ids=["closure", "inner", "cached", "decorated", "decorator", "text"],
)
def test_a_write_is_found_behind_closures_and_decorators(shop: Shop, agent: str) -> None:
    """Agents are written in such ways."""
    text = shop.refused(agent)
    assert "but writes, at shop_agents.py:" in text
    assert f"declared as shop_tables.views ({shop.place('shop_tables', 'views =')})" in text


@pytest.mark.parametrize(
    "line",
    [
        "await visits.send(key=key, value=views[key])",
        "balances[key] = views.get(key, 0) + len(views.items())",
        "bump(balances, views[key])",
        "own_counter.add(key)",
        "bump_another(views, key)",
        "own_counter.trap",
        "own_counter.trap.update(views)",
        "{}.update(views)",
        "dict(views)[key] = 1",
        "views = {}; views[key] = 1",
        "[views.pop() for views in [[1]]]",
        "from json import decoder as views; views[key] = 1",
        "(lambda views: views.pop())([1])",
        "functools.reduce(max, views.values())",
        "unknown.update(views); unknown[key] = 1",
        "later",
    ],
)
def test_what_writes_no_table_of_another_guarantee_passes(shop: Shop, line: str) -> None:
    """An application that is refused for nothing is worse off than without the check."""
    shop.check(
        PAY.format(line), "@counting.agent(visits)\nasync def visit(stream):\n    views['k'] = 1; minutes['k'] += 1"
    )


def test_agents_of_one_guarantee_write_one_table(shop: Shop) -> None:
    """They run in one batch, one after the other for each partition."""
    shop.check(
        "@counting.agent(visits)\nasync def visit(stream):\n    views['k'] += 1",
        "@counting.agent(counting.topic('clicks'))\nasync def click(stream):\n    count('k')",
    )


def test_a_function_of_a_library_is_not_looked_into(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is large, and knows no table of the application."""
    library = tmp_path / "site-packages"
    library.mkdir()
    (library / "shop_library.py").write_text("def touch(table):\n    table['k'] = 1\n")
    monkeypatch.syspath_prepend(library)
    shop.check("import shop_library", PAY.format("shop_library.touch(views)"))


def test_an_agent_without_source_passes(shop: Shop) -> None:
    """Typed into a console; the table itself refuses the write when it happens."""
    shop.check(f"exec({PAY.format('views[key] = 1')!r})")


@pytest.mark.parametrize(
    "text", ["def (", AGENTS + PAY.format("views[key] = 1").replace("pay(", "other(")], ids=["half", "another"]
)
def test_a_file_that_was_changed_since_it_was_loaded_passes(shop: Shop, tmp_path: Path, text: str) -> None:
    """It does not say what runs; a start must not fail because somebody is typing."""
    module = shop.load(PAY.format("pass"))
    (tmp_path / "shop_agents.py").write_text(text)
    check_overlaps(module.money.family)


def test_all_mistakes_are_told_at_once(shop: Shop) -> None:
    """One start for each mistake would be tiresome."""
    text = shop.refused(
        PAY.format("views[key] = 1"),
        "@counting.agent(counting.topic('payments'))\nasync def copy(stream):\n    balances['k'] = 1",
        "sums = sensing.Table('views', default=int)",
    )
    assert [re.split(r" (?=\()", line)[0].split(" is ")[0] for line in text.splitlines()] == [
        "topic payments",
        "table views",
        "agent shop_agents.pay",
        "agent shop_agents.copy",
    ]


def test_our_own_agents_pass() -> None:
    """The template must start."""
    for module in Path(agents.__file__).parent.glob("[!_]*.py"):
        importlib.import_module(f"agents.{module.stem}")
    assert app.agents
    check_overlaps(app.family)


def test_a_topic_declared_on_another_app_is_refused(shop: Shop) -> None:
    """Faust has the topic's own app fetch it: the agent would run under that app's guarantee, not under its own."""
    text = shop.refused("@sensing.agent(payments)\nasync def copy(stream):\n    pass")
    assert re.search(
        r"agent shop_agents.copy \(shop_agents.py:\d+\) runs at most once, but .* declared exactly once", text
    )
