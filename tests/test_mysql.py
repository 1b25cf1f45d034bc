"""What MySQL and MariaDB do in ways of their own, and sessions must not notice."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from flask_persist_session import (
    ConfigError,
    SessionConflict,
    SessionNotFound,
    SessionQuery,
    SessionStore,
    StoreError,
    StoreUnavailable,
    open_store,
)
from flask_persist_session.records import Change, Deletion
from flask_persist_session.stores import mysql
from flask_persist_session.testing import in_processes, make_record
from tests.servers import MySQLServer, connect_to_mysql, name_of_mysql, wait_until

NewURL = Callable[[str], str]


@pytest.fixture
def url(new_url: NewURL) -> str:
    return new_url("mysql")


@pytest.fixture
def store(url: str) -> Iterator[SessionStore]:
    with closing(open_store(url)) as opened:
        yield opened


def run(url: str, statement: str, *values: object) -> list[Any]:
    """What a statement gives on a connection of nobody's."""
    with connect_to_mysql(url) as connection, connection.cursor() as cursor:
        cursor.execute(statement, values or None)
        return list(cursor.fetchall())


def session_variable(store: SessionStore, name: str) -> Any:
    return store._database.execute_sql(f"SELECT @@SESSION.{name}").fetchone()[0]  # type: ignore[attr-defined]


# What is equal --------------------------------------------------------------------------------------------------------


def test_names_are_told_apart_byte_by_byte(store: SessionStore) -> None:
    """Users that a collation takes for the same are as many users."""
    names = ["ada", "Ada", "ADA", "ada ", "ada  ", "äda", "a\u0308da", "adа", "ada\u200b", "ß", "ss", "ada\t"]
    for number, name in enumerate(names):
        store.save(make_record(number, user_id=name, tenant_id=name), expected=0)
    for name in names:
        assert [record.user_id for record in store.find(SessionQuery(user_id=name, tenant_id=name))] == [name]
    stats = store.stats(now=0.0)
    assert stats.users == len(names)
    assert stats.tenants == dict.fromkeys(names, 1)


def test_tags_are_counted_byte_by_byte(store: SessionStore) -> None:
    """Tags that differ in case alone are two tags."""
    for number, tag in enumerate(["vip", "VIP", "vip ", "víp"]):
        store.save(make_record(number, tags=frozenset({tag})), expected=0)
    assert store.stats(now=0.0).tags == {"vip": 1, "VIP": 1, "vip ": 1, "víp": 1}


def test_leases_are_told_apart(store: SessionStore) -> None:
    """Names of leases that a collation takes for the same are as many leases."""
    with closing(open_store(url_of(store))) as other:
        assert store.lease("sweep", 60)
        assert [other.lease(name, 60) for name in ("sweep", "Sweep", "sweep ")] == [False, True, True]


def url_of(store: SessionStore) -> str:
    database = store._database  # type: ignore[attr-defined]
    return f"mysql://root@localhost/{database.database}?socket={database.connect_params['unix_socket']}"


def test_the_longest_names_of_the_widest_letters_are_kept(store: SessionStore) -> None:
    """512 characters of four bytes each are a user id, found again."""
    record = make_record(user_id="\U0001f600" * 512, tenant_id="\U0001f601" * 512, end_reason="\U0001f602" * 512)
    store.save(record, expected=0)
    assert list(store.find(SessionQuery(user_id=record.user_id))) == [record]


def test_an_insert_takes_no_existing_session(store: SessionStore) -> None:
    """What is there already is a conflict and stays as it is, alone and among others; the others are stored."""
    record = make_record(user_id="Ada")
    store.save(record, expected=0)
    other = replace(record, tenant_id="another", data=b"another")
    with pytest.raises(SessionConflict):
        store.save(other, expected=0)
    changes = [Change(record=other, expected=0), Change(record=make_record(1), expected=0)]
    assert store.save_many(changes) == [False, True]
    assert store.get(record.id) == record


def test_of_many_new_sessions_each_is_inserted_once(store: SessionStore) -> None:
    """Where one statement inserts one row, it is not tried before whether there is none of them."""
    store.save(make_record(), expected=0)
    before = inserts(store)
    outcomes = store.save_many([Change(record=make_record(number), expected=0) for number in range(150)])
    assert outcomes == [False] + [True] * 149
    assert inserts(store) == before + 150


def inserts(store: SessionStore) -> int:
    database = store._database  # type: ignore[attr-defined]
    return int(database.execute_sql("SHOW SESSION STATUS LIKE 'Com_insert'").fetchone()[1])


def test_nothing_is_cut_to_fit(url: str, store: SessionStore) -> None:
    """Where a column has become too short, storing is an error, whatever the server's own settings are."""
    run(url, "SET GLOBAL sql_mode = ''")
    try:
        store.save(make_record(), expected=0)
        run(url, "ALTER TABLE persist_session_web MODIFY tenant_id VARBINARY(4)")
        with pytest.raises(StoreError, match="too long"):
            store.save(make_record(1, tenant_id="a long name"), expected=0)
        assert store.get(make_record(1).id) is None
    finally:
        run(url, "SET GLOBAL sql_mode = DEFAULT")


def test_moments_come_back_exactly(store: SessionStore) -> None:
    """Times are the same number, to the last bit."""
    moments = [0.1 + 0.2, 1_700_000_000.123456789, 2.5e-7, 1 / 3, 123456789.00000001]
    for number, moment in enumerate(moments):
        store.save(make_record(number, created_at=moment, accessed_at=moment), expected=0)
    assert [store.get(make_record(number).id).created_at for number in range(len(moments))] == moments  # type: ignore[union-attr]


# Transactions that meet -----------------------------------------------------------------------------------------------


#: Changes of rows that are under way, with a word in them.
UNDER_WAY = "SELECT 1 FROM information_schema.processlist WHERE state = 'Updating' AND info LIKE CONCAT('%%', %s, '%%')"


def following(record: Any) -> Any:
    return replace(record, version=record.version + 1)


def test_a_transaction_that_gives_way_is_run_again(url: str, store: SessionStore) -> None:
    """When two transactions wait for each other the server undoes one; it is done again, and nobody notices."""
    first, last = sorted((make_record(1), make_record(2)), key=lambda record: record.id)
    store.save_many([Change(record=record, expected=0) for record in (first, last)])
    run(url, "CREATE TABLE ballast (id INT PRIMARY KEY)")
    with connect_to_mysql(url) as connection, connection.cursor() as cursor:
        cursor.execute("BEGIN")
        # The server undoes the one that has changed less.
        cursor.executemany("INSERT INTO ballast VALUES (%s)", [(number,) for number in range(500)])
        cursor.execute("SELECT 1 FROM persist_session_web WHERE id = %s FOR UPDATE", (last.id,))
        changes = [Change(record=following(record), expected=1) for record in (first, last)]
        thread = threading.Thread(target=lambda: store.transaction(changes))
        thread.start()
        wait_until(lambda: bool(run(url, UNDER_WAY, last.id)), "the transaction to wait")
        cursor.execute("UPDATE persist_session_web SET accessed_at = 7 WHERE id = %s", (first.id,))
        cursor.execute("COMMIT")
        thread.join()
    assert [store.get(record.id) for record in (first, last)] == [following(first), following(last)]


def test_deletions_do_not_lock_other_sessions(url: str, store: SessionStore) -> None:
    """While some are being removed, of which some are gone already, others are written and created next to them."""
    records = [make_record(number) for number in range(30)]
    store.save_many([Change(record=record, expected=0) for record in records[:20]])
    with closing(open_store(f"{url}&timeout=1")) as other, store._database.atomic():  # type: ignore[attr-defined]
        store.delete_many([Deletion(id=record.id) for record in records[::2]])
        for record in records[1:20:2]:
            other.save(following(record), expected=1)
        other.save_many([Change(record=make_record(number), expected=0) for number in range(30, 90)])


def _remove_and_create(store: SessionStore, number: int) -> int:
    """Remove and create the same few sessions as the others do, in an order of one's own."""
    done = 0
    for turn in range(40):
        record = make_record((turn * (number + 3)) % 5, user_id=str(number))
        done += sum(store.delete_many([Deletion(id=make_record(n).id) for n in (number % 5, (number + turn) % 5)]))
        done += sum(store.save_many([Change(record=record, expected=0), Change(record=make_record(turn % 5), expected=0)]))
    return done


def test_removing_and_creating_the_same_sessions_fails_for_nobody(url: str, store: SessionStore) -> None:
    """However transactions of several sessions get into each other's way, each of them is done in the end."""
    store.save(make_record(), expected=0)
    assert all(in_processes(partial(open_store, url), _remove_and_create, count=4))


def test_a_clean_up_and_appends_fail_for_nobody(url: str, store: SessionStore) -> None:
    """Sessions with histories are removed by some while others append to them and create new ones."""
    store.save(make_record(), expected=0)
    store.history.append(make_record().id, [b"x"], created_at=1.0)
    assert sum(in_processes(partial(open_store, url), _append_or_remove, count=4)) > 0


def _append_or_remove(store: SessionStore, number: int) -> int:
    done = 0
    for turn in range(60):
        records = [make_record((turn * 7 + n * (number + 1)) % 12) for n in range(4)]
        if number % 2:
            store.delete_many([Deletion(id=record.id) for record in records])
            continue
        store.save_many([Change(record=record, expected=0) for record in records])
        for record in records:
            done += _appended(store, record.id)
    return done


def _appended(store: SessionStore, session_id: str) -> int:
    try:
        return store.history.append(session_id, [b"x" * 100] * 3, created_at=1.0)
    except SessionNotFound:
        return 0


# Connections ----------------------------------------------------------------------------------------------------------


def test_a_connection_that_was_closed_while_idle_is_replaced(
    url: str, store: SessionStore, mysql_server: MySQLServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that did nothing for long may start with creating a session."""
    store.save(make_record(), expected=0)
    for (number,) in mysql_server.connections(url):
        mysql_server.execute(f"KILL {number}")
    monkeypatch.setattr(mysql, "_IDLE", 0.0)
    store.save(make_record(1), expected=0)
    assert store.count(SessionQuery()) == 2


def test_the_server_does_not_close_idle_connections(store: SessionStore) -> None:
    """Its own limit of eight hours is one that a quiet night exceeds."""
    store.get(make_record().id)
    assert session_variable(store, "wait_timeout") == 7 * 86400


def test_a_connection_that_is_lost_in_a_transaction_loses_all_of_it(
    url: str, store: SessionStore, mysql_server: MySQLServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is stored, the error is the one of the connection, and the next transaction works."""
    records = [make_record(number) for number in range(3)]
    store.save(records[0], expected=0)
    database = store._database  # type: ignore[attr-defined]
    begin = database.begin

    def begin_and_lose() -> None:
        begin()
        for (number,) in mysql_server.connections(url):
            mysql_server.execute(f"KILL {number}")

    monkeypatch.setattr(database, "begin", begin_and_lose)
    changes = [Change(record=record, expected=0) for record in records[1:]]
    with pytest.raises(StoreUnavailable, match=r"2006|2013"):
        store.transaction(changes)
    monkeypatch.undo()
    assert store.count(SessionQuery()) == 1
    store.transaction(changes)
    assert store.count(SessionQuery()) == 3


def test_a_server_that_hangs_is_waited_for_once(
    url: str, mysql_server: MySQLServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading goes on with a new connection where the old one was closed, but not where no answer came in time."""
    with closing(open_store(f"{url}&timeout=0.3")) as store:
        store.save(make_record(), expected=0)
        made: list[Any] = []
        monkeypatch.setattr(store._database, "_connect", lambda: made.append(1))  # type: ignore[attr-defined]
        mysql_server.pause()
        try:
            with pytest.raises(StoreUnavailable, match="timed out"):
                store.get(make_record().id)
        finally:
            mysql_server.resume()
        assert made == []


@pytest.mark.parametrize("do", ["get", "save"])
def test_a_server_that_hangs_is_waited_for_once_after_a_pause(
    do: str, url: str, mysql_server: MySQLServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that was idle is tried first; where that gets no answer in time, no other one is made."""
    uses = {"get": lambda: store.get(make_record().id), "save": lambda: store.save(make_record(1), expected=0)}
    with closing(open_store(f"{url}&timeout=0.3")) as store:
        store.save(make_record(), expected=0)
        made: list[Any] = []
        connect = store._database._connect  # type: ignore[attr-defined]
        monkeypatch.setattr(store._database, "_connect", lambda: made.append(1) or connect())  # type: ignore[attr-defined]
        monkeypatch.setattr(mysql, "_IDLE", -1.0)
        mysql_server.pause()
        try:
            with pytest.raises(StoreUnavailable, match="timed out"):
                uses[do]()
        finally:
            mysql_server.resume()
        assert made == []
        store.save(make_record(2), expected=0)


def test_a_statement_of_too_many_bytes_is_told(url: str, store: SessionStore, mysql_server: MySQLServer) -> None:
    """A session that is larger than the server takes is an error that says what to do, and the connection stays."""
    [(before,)] = run(url, "SELECT @@GLOBAL.max_allowed_packet")
    run(url, "SET GLOBAL max_allowed_packet = 1048576")
    try:
        store.save(make_record(data=b"x" * 400_000), expected=0)
        connections = mysql_server.connections(url)
        with pytest.raises(StoreError, match="max_allowed_packet") as caught:
            store.save(make_record(1, data=b"x" * 700_000), expected=0)
        assert not isinstance(caught.value, StoreUnavailable)
        assert store.count(SessionQuery()) == 1
        assert mysql_server.connections(url) == connections
    finally:
        run(url, f"SET GLOBAL max_allowed_packet = {before}")


def test_a_snapshot_that_is_left_is_not_read_to_its_end(store: SessionStore) -> None:
    """Whoever looks at the first session of many does not wait for the others."""
    store.save_many([Change(record=make_record(number, data=b"x" * 20_000), expected=0) for number in range(600)])
    read: list[int] = []
    connection = mysql._Connection
    receive = connection._read_bytes

    def receive_and_count(self: Any, size: int) -> Any:
        read.append(size)
        return receive(self, size)

    connection._read_bytes = receive_and_count
    try:
        snapshot = store.snapshot()
        next(snapshot)
        snapshot.close()  # type: ignore[attr-defined]
    finally:
        connection._read_bytes = receive
    assert sum(read) < 600 * 20_000 * 0.95


def test_the_url_may_say_mariadb(url: str) -> None:
    """A ``mariadb:`` URL is the same store."""
    with closing(open_store(url)) as store, closing(open_store(url.replace("mysql:", "mariadb:"))) as same:
        store.save(make_record(), expected=0)
        assert same.get(make_record().id) == make_record()


def test_a_password_of_any_letters(url: str, mysql_server: MySQLServer) -> None:
    """A password is percent-encoded in the URL, and may have letters beyond Latin."""
    name = name_of_mysql(url)
    mysql_server.execute("CREATE USER 'ада'@'%' IDENTIFIED BY 'пароль/@:%'")
    mysql_server.execute(f"GRANT ALL ON {name}.* TO 'ада'@'%'")
    try:
        with closing(open_store(url.replace("root@", "ада:пароль%2F%40:%25@"))) as store:
            store.save(make_record(), expected=0)
            assert store.get(make_record().id) == make_record()
    finally:
        mysql_server.execute("DROP USER 'ада'@'%'")


def test_a_user_who_may_not_create_tables_uses_those_that_are_there(url: str, mysql_server: MySQLServer) -> None:
    """The rights to read and write rows are enough, once somebody else has made the tables."""
    with closing(open_store(url)) as owner:
        owner.save(make_record(), expected=0)
        owner.history.append(make_record().id, [b"x"], created_at=1.0)
    mysql_server.execute("CREATE USER clerk@'%' IDENTIFIED BY ''")
    mysql_server.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {name_of_mysql(url)}.* TO clerk@'%'")
    try:
        with closing(open_store(url.replace("root@", "clerk@"))) as store:
            assert store.history.append(make_record().id, [b"y"], created_at=1.0) == 2
            store.save(following(make_record()), expected=1)
            assert store.delete(make_record().id)
    finally:
        mysql_server.execute("DROP USER clerk@'%'")


# TLS ------------------------------------------------------------------------------------------------------------------


def certificate(folder: Path, host: str) -> tuple[Path, Path]:
    """A certificate for a host, which is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.now(timezone.utc)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    paths = folder / f"{host}.pem", folder / f"{host}.key"
    paths[0].write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))
    return paths


@pytest.fixture(scope="module")
def secured(mysql_server: MySQLServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Path]]:
    """The place of a server that has a certificate, its authority, and the authority of another."""
    folder = tmp_path_factory.mktemp("certificates")
    path, key = certificate(folder, "localhost")
    other, _ = certificate(folder, "elsewhere")
    server = MySQLServer(mysql_server.folder / "secured", f"--ssl-cert={path}", f"--ssl-key={key}")
    server.folder.mkdir()
    server.start()
    server.execute("CREATE DATABASE sessions")
    server.execute("CREATE USER ada@'%' IDENTIFIED BY 'geheim'")
    server.execute("GRANT ALL ON *.* TO ada@'%'")
    yield f"mysql://ada:geheim@{{host}}:{server.port}/sessions", path, other
    server.stop()


@pytest.mark.parametrize(
    ("host", "options", "is_secured"),
    [
        ("localhost", "", True),
        ("localhost", "?ssl_mode=disabled", False),
        ("localhost", "?ssl_mode=required", True),
        ("localhost", "?ssl_ca={own}", True),
        ("127.0.0.1", "?ssl_ca={own}&ssl_mode=verify_ca", True),
    ],
)
def test_how_a_connection_is_secured(secured: tuple[str, Path, Path], host: str, options: str, is_secured: bool) -> None:
    """Without a word it is secured where the server can; the options ask for less or more."""
    place, own, other = secured
    with closing(open_store(place.format(host=host) + options.format(own=own, other=other))) as store:
        store.get(make_record().id)
        [(_, cipher)] = store._database.execute_sql("SHOW SESSION STATUS LIKE 'Ssl_cipher'").fetchall()  # type: ignore[attr-defined]
        assert bool(cipher) is is_secured


@pytest.mark.parametrize(
    ("host", "options"),
    [
        ("localhost", "?ssl_ca={other}"),
        ("localhost", "?ssl_ca={other}&ssl_mode=verify_ca"),
        ("127.0.0.1", "?ssl_ca={own}"),
        ("localhost", "?ssl_mode=verify_ca"),
    ],
)
def test_a_server_that_cannot_prove_who_it_is_gets_nothing(
    secured: tuple[str, Path, Path], host: str, options: str
) -> None:
    """A certificate of nobody known, or of another host, is refused."""
    place, own, other = secured
    store = open_store(place.format(host=host) + options.format(own=own, other=other))
    with pytest.raises(StoreUnavailable, match="certificate") as caught:
        store.get(make_record().id)
    assert "geheim" not in str(caught.value)


def test_a_server_without_a_certificate_cannot_be_required_to_have_one(url: str) -> None:
    """``ssl_mode=required`` is an error there, not a connection in the clear."""
    store = open_store(f"{url}&ssl_mode=required")
    with pytest.raises(StoreError, match="SSL"):
        store.get(make_record().id)


@pytest.mark.parametrize("option", ["ssl_ca", "socket"])
def test_an_option_without_a_path_is_refused(option: str) -> None:
    """One that is empty, by a variable that is not set, would be a connection that is less secure than it looks."""
    with pytest.raises(ConfigError, match=option) as caught:
        open_store(f"mysql://ada:geheim@localhost/sessions?{option}=")
    assert "geheim" not in str(caught.value)


# Tables ---------------------------------------------------------------------------------------------------------------


def test_tables_that_were_made_in_part_are_completed(url: str) -> None:
    """A process that dies between the tables leaves some, for good; the next one makes the others."""
    with closing(open_store(url)) as store:
        store.save(make_record(), expected=0)
    run(url, "DROP TABLE persist_session_web")
    run(url, "DELETE FROM persist_schema")
    with closing(open_store(url)) as store:
        store.save(make_record(), expected=0)
        assert list(store.check(repair=False)) == []


def test_a_missing_index_is_made_anew(url: str, store: SessionStore) -> None:
    """A check tells of it, and a repair makes it."""
    store.save(make_record(), expected=0)
    run(url, "DROP INDEX persist_session_web_user ON persist_session_web")
    assert [finding.repaired for finding in store.check(repair=False)] == [False]
    assert [finding.repaired for finding in store.check(repair=True)] == [True]
    assert list(store.check(repair=False)) == []


def rows_read(store: SessionStore, do: Callable[[], object]) -> int:
    """How many rows and entries of indexes the server looks at for something."""

    def total() -> int:
        status = store._database.execute_sql("SHOW SESSION STATUS LIKE 'Handler_read%%'").fetchall()  # type: ignore[attr-defined]
        return sum(int(number) for _, number in status)

    before = total()
    do()
    return total() - before


@pytest.mark.parametrize(
    "query",
    [
        SessionQuery(user_id="Ada"),
        SessionQuery(user_id="Ada", tenant_id="acme", state="active", now=1.0),
        SessionQuery(expires_before=2.0, limit=3),
        SessionQuery(order_by="expires_at", after=(1.5e9, make_record().id), limit=3),
        SessionQuery(id_prefix="3ff", limit=3),
        SessionQuery(order_by="id", limit=3),
    ],
    ids=["user", "live ones of a user", "expired", "a later page", "prefix", "first"],
)
def test_what_a_query_looks_at_does_not_grow(url: str, store: SessionStore, query: SessionQuery) -> None:
    """With 2,000 sessions of others, the server looks at as many rows as without."""
    mine = [make_record(n, user_id="Ada", tenant_id="acme", expires_at=1.0 if n < 3 else 2e9) for n in range(6)]
    store.save_many([Change(record=record, expected=0) for record in mine])
    list(store.find(query))
    alone = rows_read(store, lambda: list(store.find(query)))
    others = [make_record(n, user_id=f"user {n}", expires_at=1e9, data=b"x" * 500) for n in range(6, 2006)]
    store.save_many([Change(record=record, expected=0) for record in others])
    run(url, "ANALYZE TABLE persist_session_web")
    assert rows_read(store, lambda: list(store.find(query))) <= 2 * alone + 10


def test_what_a_history_costs_does_not_grow(store: SessionStore) -> None:
    """With 10,000 entries the server looks at as many as with ten."""
    record = make_record()
    store.save(record, expected=0)
    store.history.append(record.id, [b"x"] * 10, created_at=1.0)
    uses: list[Callable[[], object]] = [
        lambda: store.history.append(record.id, [b"y"], created_at=1.0, key=os.urandom(8).hex()),
        lambda: store.history.read(record.id, newest=True, limit=5),
        lambda: store.history.read(record.id, after=5, limit=5),
        lambda: store.history.count(record.id),
    ]
    for use in uses:
        use()
    short = [rows_read(store, use) for use in uses]
    store.history.append(record.id, [b"x"] * 10_000, created_at=1.0)
    assert [rows_read(store, use) for use in uses] == short


def test_optimizing_gives_room_back(store: SessionStore) -> None:
    """``full`` rewrites the table, and tells how much that gave back."""
    store.save_many([Change(record=make_record(n, data=os.urandom(20_000)), expected=0) for n in range(300)])
    store.delete_many([Deletion(id=make_record(n).id) for n in range(290)])
    assert [done.freed for done in store.optimize()] == [0]
    [done] = store.optimize(full=True)
    assert done.freed > 1_000_000


def test_what_could_not_be_tidied_up_is_an_error(url: str) -> None:
    """Where somebody has locked the table, that is told in place of a success."""
    with closing(open_store(f"{url}&timeout=1")) as store, connect_to_mysql(url) as connection:
        store.save(make_record(), expected=0)
        with connection.cursor() as cursor:
            cursor.execute("LOCK TABLES persist_session_web WRITE")
            with pytest.raises(StoreError, match="Lock wait timeout"):
                list(store.optimize(full=True))


# Forks ----------------------------------------------------------------------------------------------------------------


def test_a_forked_child_leaves_the_connection_to_its_parent(store: SessionStore) -> None:
    """The child connects anew, and its end does not end the transaction that the parent is in."""
    store.save(make_record(), expected=0)
    database = store._database  # type: ignore[attr-defined]
    with database.atomic():
        database.execute_sql("DELETE FROM persist_session_web")
        child = os.fork()
        if not child:
            found = store.get(make_record().id)
            os._exit(0 if found == make_record() else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert store.get(make_record().id) is None
