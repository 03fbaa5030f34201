"""The commands on dead letters: thin click functions around the modules that do the work. Exit codes as in commands.py."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click
from faust.cli.base import cli
from rich.console import Console

from streams_app import letters_view as view
from streams_app.commands import console, exit_codes, print_json, reached_kafka
from streams_app.letters import Choice, Letters, Listing, Place, parse_moment
from streams_app.progress import shown_count
from streams_app.replay import Replay, Transactions, Unfenced

if TYPE_CHECKING:
    from streams_app.application import App


class _Parsed(click.ParamType):
    """What ``parse`` makes of the text; its ValueErrors are sentences for people."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


_MOMENT = _Parsed("time", lambda text: parse_moment(text, time.time_ns() // 1_000_000))
_PLACE = _Parsed("place", Place.parse)


def _filters(command: Callable[..., None]) -> Callable[..., None]:
    """The options that choose letters, the same for all commands on them."""
    options = (
        click.option(
            "--topic", "topics", multiple=True, help="Topic that they came from, without prefix; may be repeated."
        ),
        click.option("--error", "errors", multiple=True, help="Code of the error; may be repeated."),
        click.option("--since", type=_MOMENT, help="RFC 3339 time, or how long ago: 90s, 10m, 2h, 7d."),
        click.option("--until", type=_MOMENT, help="The same; letters of that time and later are left out."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _choice(
    topics: tuple[str, ...],
    errors: tuple[str, ...],
    since: int | None,
    until: int | None,
    places: tuple[Place, ...] = (),
) -> Choice:
    if since is not None and until is not None and since >= until:
        raise click.UsageError("--since is not before --until: there is no time in between")
    return Choice(frozenset(topics), frozenset(errors), since, until, frozenset(places))


def register_dead_letters(app: App) -> None:
    """Add the group ``dead-letters`` to ``faust -A streams_app``, for ``app``."""
    settings = app.settings

    @contextlib.contextmanager
    def opened_letters() -> Iterator[Letters]:
        with exit_codes(), reached_kafka(settings) as address:
            with console(plain=True).status("reading what was replayed"):
                letters = Letters(address, settings)
            with contextlib.closing(letters):
                yield letters

    @cli.group("dead-letters")
    def dead_letters() -> None:
        """Show what was set aside, and send it back."""

    @dead_letters.command("list")
    @_filters
    @click.option(
        "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="The newest; all are counted."
    )
    @click.option("--json", "as_json", is_flag=True, help="One document with full content, alone on stdout.")
    def list_(limit: int, as_json: bool, **filters: Any) -> None:
        """Show dead letters with their reasons."""
        choice = _choice(**filters)
        with opened_letters() as letters, console(plain=True).status("reading dead letters"):
            listing = Listing(letters.read(choice), limit, newest=True)
        if as_json:
            print_json(view.document(listing))
            return
        out = console()
        if listing.letters:
            out.print(view.table(listing), "")
        _print_lines(out, [view.summary(listing), *view.kinds(listing)])

    @dead_letters.command("replay")
    @click.argument("places", metavar="[PARTITION@OFFSET]...", nargs=-1, type=_PLACE)
    @_filters
    @click.option("--limit", type=click.IntRange(min=1), help="The oldest of those that were not replayed.")
    @click.option("--all", "everything", is_flag=True, help="Every letter: needed where nothing else chooses.")
    @click.option("--again", is_flag=True, help="Also those that were replayed before.")
    @click.option("--cut-too", is_flag=True, help="Also what there is of those that are not whole.")
    @click.option("--dry-run", is_flag=True, help="Show what would be sent; send nothing.")
    @click.option("--yes", is_flag=True, help="Do not ask.")
    @click.option(
        "--without-transactions", is_flag=True, help="Where none are permitted: a replay that dies may repeat a letter."
    )
    def replay(
        places: tuple[Place, ...],
        limit: int | None,
        everything: bool,
        again: bool,
        cut_too: bool,
        dry_run: bool,
        yes: bool,
        without_transactions: bool,
        **filters: Any,
    ) -> None:
        """Send dead letters back to where they came from, each of them once."""
        choice = _choice(**filters, places=places)
        if everything == (choice != Choice()):
            raise click.UsageError("choose letters by their places or by filters, or all of them by --all")
        out, asks = console(), sys.stdin.isatty() and not yes and not dry_run
        with opened_letters() as letters:
            with console(plain=True).status("reading dead letters"):
                work = Replay(letters, choice, limit=limit, again=again, cut_too=cut_too)
            if work.due and (asks or dry_run):
                out.print(view.table(work.pending))
                _print_lines(out, view.kinds(work.pending))
            try:
                if work.due and not dry_run and not (asks and not click.confirm(f"Send {work.due} of them back?")):
                    fenced = not without_transactions
                    sender = Transactions(letters, f"{app.conf.id}-replay") if fenced else Unfenced(letters)
                    with shown_count(out, "sending back", "letters", work.due) as on_progress:
                        work.send(sender, on_progress)
            finally:
                _print_lines(out, view.outcome(work))
        sys.exit(1 if work.findings.list() else 0)


def _print_lines(out: Console, lines: Iterable[str]) -> None:
    """Sentences, each in a line of its own however long it is; what others wrote in them is no markup."""
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
