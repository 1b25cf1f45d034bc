"""What a query and a record are, whatever the store."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any, get_type_hints

import pytest

from flask_persist_session import SessionManager, SessionQuery, SessionRecord, open_store
from flask_persist_session.testing import make_record
from tests.servers import RedisServer

ID = make_record().id
OTHER = make_record(1).id


def test_a_record_says_what_it_is_made_of() -> None:
    """Its ``__init__`` is not the one of dataclasses, and tells tools the same; a record stays as it is made."""
    init = SessionRecord.__init__
    assert get_type_hints(init) == get_type_hints(SessionRecord) | {"return": type(None)}
    assert init.__module__ == SessionRecord.__module__
    with pytest.raises(
        TypeError, match=r"SessionRecord.__init__\(\) missing 11 required keyword-only arguments: 'user_id'"
    ):
        SessionRecord(id="")  # type: ignore[call-arg]
    with pytest.raises(FrozenInstanceError):
        make_record().id = ""  # type: ignore[misc]


@pytest.mark.parametrize(
    "wrong",
    [
        {"after": (1.0, ID)},
        {"after": (1.0, ID), "order_by": "created_at", "offset": 1},
        {"after": (1.0, ID), "order_by": "id"},
        {"after": (OTHER, ID), "order_by": "-id"},
        {"after": (ID, ID), "order_by": "created_at"},
        {"after": (math.nan, ID), "order_by": "created_at"},
        {"after": (math.inf, ID), "order_by": "created_at"},
        {"after": (True, ID), "order_by": "created_at"},
        {"after": (1.0, "f" * 67), "order_by": "created_at"},
        {"after": ("", ""), "order_by": "id"},
        {"after": (1.0,), "order_by": "created_at"},
        {"after": "abc", "order_by": "created_at"},
        {"after": (1.0, 7), "order_by": "created_at"},
        {"after": (10**400, ID), "order_by": "created_at"},
    ],
    ids=str,
)
def test_a_position_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    """``after`` needs an order and a position in it, and takes no offset."""
    with pytest.raises(ValueError, match="after"):
        SessionQuery(**wrong)


@pytest.mark.parametrize("judged", [{"active": False}, {"has_history": False}, {"processed": True}, {}], ids=str)
@pytest.mark.parametrize(
    "wrong", [{"limit": -1}, {"offset": -1}, {"after": (1.0, ID), "order_by": "created_at", "offset": 1}]
)
def test_wrong_pages_are_refused_whatever_is_looked_for(judged: dict[str, Any], wrong: dict[str, Any]) -> None:
    """Also where the manager cuts the page, because no store knows the condition."""
    manager = SessionManager(open_store("memory://"))
    with pytest.raises(ValueError, match=r"limit|after"):
        manager.find(**judged, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"user_id": 7}, {"tenant_id": 7}, {"tags": "hot"}, {"tags": ["hot"]}],
    ids=str,
)
def test_what_would_match_nothing_is_refused(wrong: dict[str, Any]) -> None:
    """Users and tenants are text, and tags a frozenset: anything else is a mistake, not an empty list."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SessionQuery(**wrong)


def test_the_position_of_a_record() -> None:
    """It is the value of the field by which the order is, and the id."""
    record = make_record(accessed_at=7.5)
    assert SessionQuery(order_by="-accessed_at").position(record) == (7.5, record.id)
    assert SessionQuery(order_by="id").position(record) == SessionQuery().position(record) == (record.id, record.id)


def test_only_what_comes_later_matches() -> None:
    """Neither the record itself nor what comes before it; of the same time, what has a later id."""
    records = sorted((make_record(number, accessed_at=7.0) for number in range(3)), key=lambda record: record.id)
    query = SessionQuery(order_by="accessed_at", after=(7.0, records[1].id))
    assert [query.matches(record) for record in records] == [False, False, True]
    backwards = replace(query, order_by="-accessed_at")
    assert [backwards.matches(record) for record in records] == [True, False, False]


@pytest.mark.parametrize("limit", [1, 20])
def test_a_page_by_id_reads_what_it_needs_from_redis(
    new_url: Callable[[str], str], redis_server: RedisServer, limit: int
) -> None:
    """A late page by id costs no more commands than the first, and no more records than its limit are read."""
    store = open_store(new_url("redis"))
    for number in range(300):
        store.save(make_record(number, user_id=None, id=f"{number // 3:03x}{number:064x}"), expected=0)
    query, counts = SessionQuery(order_by="id", limit=limit), []
    late = replace(query, after=(f"050{240:064x}",) * 2)
    with redis_server.client() as client:
        for page in query, late:
            client.config_resetstat()
            assert len(list(store.find(page))) == limit
            counts.append(client.info("commandstats")["cmdstat_hmget"]["calls"])
    store.close()
    assert counts == [limit, limit]


def test_a_page_of_a_user_is_one_script_of_redis(new_url: Callable[[str], str], redis_server: RedisServer) -> None:
    """The server finds a user's latest sessions in one step, and sends no other; what it cannot judge is left out here."""
    store = open_store(new_url("redis"))
    records = [make_record(number, accessed_at=float(number), data=bytes(10_000)) for number in range(20)]
    for record in records:
        store.save(record, expected=0)
    query = SessionQuery(user_id="alice", state="active", now=0.0, order_by="-accessed_at", limit=2)
    list(store.find(query))  # the server is given the script
    with redis_server.client() as client:
        client.config_resetstat()
        assert list(store.find(query)) == records[:-3:-1]
        assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == 1
        assert int(client.info("stats")["total_net_output_bytes"]) < 40_000
        for key in client.scan_iter(match=f"*:s:{records[-1].id}"):
            client.hset(key, "record", b"damaged")
    assert list(store.find(query)) == records[-2:-4:-1]
    store.close()


@pytest.mark.parametrize("field", ["created", "accessed", "expires"])
def test_the_bounds_of_a_time(field: str) -> None:
    """``after`` is that moment or later, ``before`` is earlier: spans that meet have nothing in common."""
    record = make_record(**{f"{field}_at": 50.0})
    for moment, after, before in (49.0, True, False), (50.0, True, False), (51.0, False, True):
        assert SessionQuery(**{f"{field}_after": moment}).matches(record) is after
        assert SessionQuery(**{f"{field}_before": moment}).matches(record) is before
