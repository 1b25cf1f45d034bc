"""The example waits for slow generators without being held up by them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from example_app.pauses import with_pauses


def test_everything_comes_in_order() -> None:
    """Of a quick generator, each piece is there, and nothing else."""
    assert list(with_pauses(iter("abc"), 60)) == ["a", "b", "c"]


def test_a_pause_is_told() -> None:
    """While nothing comes, an empty text does, as often as is wanted."""
    go_on = threading.Event()

    def slow() -> Iterator[str]:
        go_on.wait(10)
        yield "late"

    pieces = with_pauses(slow(), 0.01)
    assert [next(pieces), next(pieces)] == ["", ""]
    go_on.set()
    assert [piece for piece in pieces if piece] == ["late"]


def test_an_error_is_raised_where_it_is_waited_for() -> None:
    """What the generator raises comes behind the pieces before it."""

    def failing() -> Iterator[str]:
        yield "a"
        raise KeyError("b")

    pieces = with_pauses(failing(), 60)
    assert next(pieces) == "a"
    with pytest.raises(KeyError):
        next(pieces)


def test_whoever_wants_no_more_closes_the_generator() -> None:
    """A generator whose pieces nobody takes any more is left at its next one, and can clean up."""
    closed = threading.Event()

    def endless() -> Iterator[str]:
        try:
            while True:
                yield "again"
        finally:
            closed.set()

    pieces = with_pauses(endless(), 60)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert closed.wait(10)
