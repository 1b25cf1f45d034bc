"""What the commands print: tables that fit the terminal, times and sizes that people read, text that does no harm."""

from __future__ import annotations

import math
import shutil
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from itertools import chain, islice
from pprint import pformat
from time import monotonic
from typing import Any
from uuid import UUID

import click

from .records import SessionRecord

#: The width of what is no terminal, such as a pipe: nothing is cut there.
_UNLIMITED = 1_000_000
_UNITS = (("year", 365 * 86400), ("day", 86400), ("hour", 3600), ("minute", 60))
#: So many rows decide how wide the columns are; more would have to be kept in memory.
_MEASURED = 500
_GAP = 2


class Interrupted(click.ClickException):
    """Somebody pressed Ctrl-C; the message says what was done and what to do next."""

    exit_code = 130


@contextmanager
def progress(label: str, length: int | None = None) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, nothing elsewhere; gives what to call with each number of things done.

    *length* is how many there will be; ``None`` if that is not known.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    things: Any = {"length": length} if length is not None else {"iterable": iter(())}
    with click.progressbar(label=label, file=sys.stderr, show_pos=True, show_percent=length is not None, **things) as bar:
        yield bar.update


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """Counts the seconds on a terminal, where nobody knows how far something is; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()
    counting = threading.Thread(target=_count_seconds, args=(label, done), daemon=True)
    counting.start()
    try:
        yield
    finally:
        done.set()
        counting.join()


def _count_seconds(label: str, done: threading.Event) -> None:
    start, is_done = monotonic(), False
    while not is_done:
        click.echo(f"\r{label}  {monotonic() - start:.0f} s", nl=False, err=True)
        is_done = done.wait(1.0)
    click.echo(err=True)


def terminal_width() -> int:
    """How many characters a line may have: those of the terminal or of ``COLUMNS``, any number in a pipe."""
    return shutil.get_terminal_size((_UNLIMITED, 24)).columns


def escape(text: str) -> str:
    """*text* with all that a terminal might obey, and line ends, written as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def name(text: str) -> str:
    """What somebody named, in quotes if its beginning or end cannot be seen."""
    return escape(text) if text and text == text.strip() else repr(text)


def one_line(text: str) -> str:
    """An error of several lines, such as a driver's, in one."""
    return escape(" ".join(text.split()))


def size(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    scaled = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if scaled < 1000 or unit == "GB":
            break
        scaled /= 1000
    return f"{scaled:,.0f} {unit}" if unit == "bytes" else f"{scaled:,.1f} {unit}"


def moment(seconds: float | None) -> str:
    """A time as date, hour and minute in UTC."""
    return "none" if seconds is None else f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M} UTC"


def relative(seconds: float, now: float) -> str:
    """How far a time is from *now*: "5 minutes ago", "in 30 days"."""
    distance = abs(seconds - now)
    # Two of a unit at least: "47 hours" says more than "1 day".
    unit, length = next(((unit, length) for unit, length in _UNITS if distance >= 2 * length), ("second", 1))
    count = int(distance // length)
    if count == 0:
        return "now"
    words = f"{count:,} {unit}{'' if count == 1 else 's'}"
    return f"in {words}" if seconds > now else f"{words} ago"


def both(seconds: float, now: float) -> str:
    """A time to the second in UTC, and how far it is from *now*."""
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S} UTC ({relative(seconds, now)})"


def owner(record: SessionRecord) -> str:
    """Whose session it is, in words."""
    if record.user_id is None:
        return "nobody"
    tenant = "" if record.tenant_id is None else f" of tenant {record.tenant_id!r}"
    return f"user {record.user_id!r}{tenant}"


# Values ---------------------------------------------------------------------------------------------------------------


def pretty(value: object, width: int) -> list[str]:
    """A Python value as Python writes it, in lines of about *width* characters."""
    try:
        lines = pformat(value, width=max(20, min(width, 100)), sort_dicts=False).splitlines()
    except ValueError:
        # Python limits the digits of an integer in decimal, and JSON values have it in hexadecimal.
        lines = [str(plain(value))]
    return [escape(line) for line in lines]


def plain(value: Any) -> Any:
    """A value as JSON has it: lists for tuples, sets and deques, text for all that JSON lacks."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return value if value.bit_length() < 64 else hex(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (date, datetime, time)):
        return value.isoformat()
    if isinstance(value, (Decimal, UUID, timedelta)):
        return str(value)
    if isinstance(value, (bytes, bytearray)) or not isinstance(value, Iterable):
        return repr(value)
    return [plain(item) for item in value]


# Tables ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    :param cell: what a record has in it.
    :param rank: of two columns that do not fit, the one with the higher rank is left out; 0: never.
    :param narrowest: to how many characters it may be cut; ``None``: not at all.
    :param mark: what shows that it was cut.
    """

    title: str
    cell: Callable[[SessionRecord], str]
    rank: int = 0
    narrowest: int | None = None
    mark: str = "…"


def table(columns: list[Column], records: Iterator[SessionRecord], width: int) -> Iterator[str]:
    """The lines of a table of *records* that is no wider than *width*, one by one."""
    rows = ([column.cell(record) for column in columns] for record in records)
    first = list(islice(rows, _MEASURED))
    if not first:
        return
    # Columns without anything in them are left out, if all rows are known.
    natural = {
        column: max(map(_width, (column.title, *cells)))
        for column, *cells in zip(columns, *first, strict=True)
        if column.rank == 0 or len(first) == _MEASURED or any(cells)
    }
    widths = _fit(natural, width)
    for row in chain([[column.title for column in columns]], first, rows):
        cells = zip(columns, row, strict=True)
        shown = (_cell(text, widths[column], column.mark) for column, text in cells if column in widths)
        yield (" " * _GAP).join(shown).rstrip()


def _fit(widths: dict[Column, int], width: int) -> dict[Column, int]:
    """The widths at which the columns fit: abbreviated ids first, then less in each, then fewer of them."""
    while (excess := sum(widths.values()) + _GAP * (len(widths) - 1) - width) > 0:
        spare = _spare(widths)
        unmarked = next((c for c in spare if not c.mark), None)
        if unmarked is not None:
            widths[unmarked] -= spare[unmarked]
        elif sum(spare.values()) >= excess or (spare and not any(c.rank for c in widths)):
            widths[max(spare, key=lambda c: widths[c])] -= 1
        elif any(c.rank for c in widths):
            del widths[max(widths, key=lambda c: c.rank)]
        else:
            break
    return widths


def _spare(widths: dict[Column, int]) -> dict[Column, int]:
    """By how much each column may still be cut."""
    spare = {c: size - c.narrowest for c, size in widths.items() if c.narrowest is not None and size > c.narrowest}
    if spare or any(c.rank for c in widths):
        return spare
    # Nothing can be left out any more. Less of an id would name nothing, less of the rest is better than wrapped lines.
    return {c: size - 1 for c, size in widths.items() if c.mark and size > 1}


def _cell(text: str, size: int, mark: str) -> str:
    if _width(text) > size:
        while _width(text) + len(mark) > size:
            text = text[:-1]
        text += mark
    return text + " " * (size - _width(text))


def _width(text: str) -> int:
    """How many columns of a terminal *text* takes: East Asian characters two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in text)
