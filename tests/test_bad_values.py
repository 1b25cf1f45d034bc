"""Values that can be stored and values that cannot, and settings that are wrong."""

from __future__ import annotations

import enum
import json
import math
import re
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from flask import Flask, session
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from flask_persist_session import (
    ConfigError,
    PersistSession,
    SerializationError,
    SessionTooLarge,
    open_store,
)
from flask_persist_session.serializers import MAX_DEPTH, SERIALIZERS, Codec, dump_metadata, load_metadata

MakeApp = Callable[..., Flask]
EXACT_SERIALIZERS = ("msgpack", "json")


def exactly(value: Any) -> Any:
    """What distinguishes *value* from every other: types, order where it counts, and NaN is equal to NaN."""
    kind = type(value)
    if isinstance(value, dict):
        return kind, [(exactly(key), exactly(item)) for key, item in value.items()]
    if isinstance(value, (set, frozenset)):
        return kind, sorted(repr(exactly(item)) for item in value)
    if isinstance(value, deque):
        return kind, value.maxlen, [exactly(item) for item in value]
    if isinstance(value, (list, tuple)):
        return kind, [exactly(item) for item in value]
    return kind, repr(value)


# The application ------------------------------------------------------------------------------------------------------


@dataclass
class Site:
    """An application whose views put into the session what a test wants, and take it out again."""

    app: Flask
    put: dict[str, Any] = field(default_factory=dict)
    taken: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def make_site(make_app: MakeApp) -> Callable[..., Site]:
    def make(store: Any = "memory://", **settings: Any) -> Site:
        site = Site(make_app(store, TESTING=False, **settings))

        @site.app.get("/put")
        def put() -> str:
            session.update(site.put)
            return "stored"

        @site.app.get("/put-now")
        def put_now() -> str:
            session.update(site.put)
            session.save()
            return "stored"

        @site.app.get("/append")
        def append() -> str:
            session["kept"].append(site.put["value"])
            return "stored"

        @site.app.get("/take")
        def take() -> str:
            site.taken = dict(session)
            return "taken"

        return site

    return make


# Exact types ----------------------------------------------------------------------------------------------------------

BERLIN = ZoneInfo("Europe/Berlin")
VALUES: dict[str, Any] = {
    "None": None,
    "bools": [True, False],
    "ints": [0, -1, 1, 2**63 - 1, -(2**63), 2**64 - 1],
    "ints beyond 64 bits": [2**64, -(2**63) - 1, 10**4000],
    "floats": [0.0, -0.0, 0.1, 1e308, 5e-324, 1.0],
    "floats that are no numbers": [math.nan, math.inf, -math.inf],
    "str": ["", "Ada", "Adâ 😀", "\x00", "a\u2028b"],
    "str that UTF-8 does not allow": ["\ud800", "a\udfffb"],
    "bytes": [b"", b"\x00\xff", b"x" * 70_000],
    "bytearray": [bytearray(), bytearray(b"\xc4\xc5\xc6")],
    "list": [[], [[]], [1, "1", 1.0, True]],
    "dict": [{}, {"": {}}, {"a": {"b": {"c": None}}}],
    "dict in its order": {"b": 1, "a": 2},
    "dict with other keys": {1: "a", 2.5: "b", None: "c", (1, (2,)): "d", b"e": "e", date(2024, 2, 29): "f"},
    "dict with bools for keys": {True: "yes", False: "no"},
    "dict with Markup for a key": {Markup("<b>"): "bold"},
    "dict that looks like a tag": [{" t": [1]}, {" di": {" t": 1}}, {" unknown": 1}, {" ": 1}],
    "tuple": [(), (1,), (1, (2, (3,)))],
    "set": [set(), {1, "1", (1,), None}],
    "frozenset": [frozenset(), frozenset({frozenset({1}), 2})],
    "datetime": [datetime(2024, 2, 29, 23, 59, 59, 999_999), datetime.min, datetime.max],
    "datetime aware": datetime(2024, 2, 29, tzinfo=timezone.utc),
    "datetime with an offset": datetime(2024, 2, 29, tzinfo=timezone(timedelta(hours=-3, minutes=-30))),
    "datetime in a zone": datetime(2024, 7, 1, 12, tzinfo=BERLIN),
    "datetime in an hour that comes twice": [datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN, fold=fold) for fold in (0, 1)],
    "date": [date(2024, 2, 29), date.min, date.max],
    "time": [time(), time(23, 59, 59, 1), time(1, 2, fold=1), time(1, tzinfo=timezone.utc), time(2, tzinfo=BERLIN)],
    "timedelta": [timedelta(), timedelta(-1, 2, 3), timedelta.min, timedelta.max],
    "UUID": UUID("12345678-1234-5678-1234-567812345678"),
    "Decimal": [Decimal(text) for text in ("1.10", "-0", "1E+500", "NaN", "sNaN", "-Infinity")],
    "Markup": [Markup("<b>bold</b>"), Markup("")],
    "OrderedDict": [OrderedDict(), OrderedDict(b=1, a=2), OrderedDict([(1, "one")])],
    "deque": [deque(), deque([1, (2,)]), deque([1, 2], maxlen=5)],
    "all inside each other": {"a": [(1, {2, 3}, OrderedDict(x=deque([{"y": frozenset({(Decimal(1),)})}])))]},
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("serializer", EXACT_SERIALIZERS)
def test_comes_back_with_its_type(make_site: Callable[..., Site], serializer: str, value: Any) -> None:
    """A value that one request puts into the session is the same, of the same type, in the next."""
    site = make_site(PERSIST_SESSION_SERIALIZER=serializer)
    client = site.app.test_client()
    site.put = {"value": value}
    assert client.get("/put").status_code == 200
    client.get("/take")
    assert exactly(site.taken["value"]) == exactly(value)


@pytest.mark.parametrize("serializer", EXACT_SERIALIZERS)
def test_keys_of_the_session_keep_their_types(make_site: Callable[..., Site], serializer: str) -> None:
    """The session's own keys come back as they were too."""
    site = make_site(PERSIST_SESSION_SERIALIZER=serializer)
    client = site.app.test_client()
    site.put = {1: "int", "1": "str", (1,): "tuple", " t": "like a tag", "\ud800": "surrogate"}  # type: ignore[dict-item]
    assert client.get("/put").status_code == 200
    client.get("/take")
    assert exactly(site.taken) == exactly(site.put)


@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_changing_the_serializer_loses_no_session(make_site: Callable[..., Site], serializer: str) -> None:
    """What msgpack or json wrote is read whichever serializer is configured now."""
    store = open_store("memory://")
    before = {name: make_site(store, PERSIST_SESSION_SERIALIZER=name) for name in EXACT_SERIALIZERS}
    after = make_site(store, PERSIST_SESSION_SERIALIZER=serializer)
    for site in before.values():
        client, now = site.app.test_client(), after.app.test_client()
        site.put = {"value": (1, {2})}
        client.get("/put")
        cookie = client.get_cookie("session")
        assert cookie is not None
        now.set_cookie("session", cookie.value)
        now.get("/take")
        assert exactly(after.taken["value"]) == exactly((1, {2}))


hashable = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(st.characters(exclude_categories=())),
        st.binary(),
        st.datetimes(timezones=st.one_of(st.none(), st.timezones(), st.just(timezone.utc))),
        st.dates(),
        st.times(timezones=st.one_of(st.none(), st.timezones())),
        st.timedeltas(),
        st.uuids(),
        st.decimals().filter(lambda number: not number.is_snan()),
        st.text().map(Markup),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.frozensets(inner, max_size=3)),
    max_leaves=5,
)
values = st.recursive(
    hashable | st.binary().map(bytearray),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.sets(hashable, max_size=3),
        st.dictionaries(st.text() | hashable, inner, max_size=4),
        st.dictionaries(st.sampled_from([" t", " di", " k", " b", " "]), inner, max_size=2),
        st.lists(st.tuples(hashable, inner), max_size=3).map(OrderedDict),
        st.builds(deque, st.lists(inner, max_size=3), st.none() | st.integers(3, 9)),
    ),
    max_leaves=12,
)
sessions = st.dictionaries(st.text() | hashable, values, max_size=4)


@pytest.mark.parametrize("serializer", EXACT_SERIALIZERS)
@settings(max_examples=100, deadline=None)
@given(data=sessions)
def test_any_nested_value_comes_back(serializer: str, data: dict[Any, Any]) -> None:
    """Whatever is nested of the supported types comes back with its exact types, and gives the same bytes again."""
    codec = Codec(serializer)
    payload = codec.encode(data)
    decoded = codec.decode(payload)
    assert exactly(decoded) == exactly(data)
    assert codec.encode(decoded) == payload


@pytest.mark.parametrize("serializer", SERIALIZERS)
@settings(max_examples=100, deadline=None)
@given(payload=st.binary(max_size=60), data=sessions, place=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_any_damage_is_an_error_of_ours(
    serializer: str, payload: bytes, data: dict[Any, Any], place: int, byte: int
) -> None:
    """Reading noise, or a payload with one byte changed, gives a mapping or a SerializationError, nothing else."""
    codec = Codec(serializer, keys=lambda: ["a secret for tests"])
    changed = bytearray(Codec("msgpack" if serializer == "pickle" else serializer).encode(data))
    changed[place % len(changed)] = byte
    for damaged in (payload, codec.encode({})[:1] + payload, bytes(changed)):
        with suppress(SerializationError):
            assert type(codec.decode(damaged)) is dict


# Values that cannot be stored -----------------------------------------------------------------------------------------


class Plain:
    pass


class Text(str):
    __slots__ = ()


class Number(int):
    pass


class Things(list[Any]):
    pass


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Shade(str, enum.Enum):
    DARK = "dark"


@dataclass
class Point:
    x: int = 1


Pair = namedtuple("Pair", "left right")


def endless() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


def endless_dict() -> dict[str, Any]:
    inner: dict[str, Any] = {}
    inner["self"] = inner
    return inner


def deep() -> list[Any]:
    """A list within a list, and so on, further than Python's stack reaches."""
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


UNSTORABLE: dict[str, Callable[[], Any]] = {
    "object": Plain,
    "class": lambda: Plain,
    "function": lambda: endless,
    "module": lambda: math,
    "generator": lambda: (number for number in range(3)),
    "iterator": lambda: iter([1]),
    "range": lambda: range(3),
    "subclass of str": lambda: Text("x"),
    "subclass of int": lambda: Number(1),
    "subclass of list": lambda: Things([1]),
    "defaultdict": lambda: defaultdict(list),
    "Counter": lambda: Counter("aab"),
    "namedtuple": lambda: Pair(1, 2),
    "dataclass": Point,
    "enum": lambda: Colour.RED,
    "enum of ints": lambda: Level.HIGH,
    "enum of strings": lambda: Shade.DARK,
    "complex": lambda: 1j,
    "Fraction": lambda: Fraction(1, 3),
    "memoryview": lambda: memoryview(b"x"),
    "path": lambda: Path("x"),
    "time zone": lambda: timezone.utc,
    "exception": lambda: ValueError("x"),
    "Ellipsis": lambda: ...,
    "view of a dict": lambda: {"a": 1}.keys(),
    "list that contains itself": endless,
    "dict that contains itself": endless_dict,
    "list nested beyond the stack": deep,
}


@pytest.mark.parametrize("make", UNSTORABLE.values(), ids=UNSTORABLE)
@pytest.mark.parametrize("serializer", EXACT_SERIALIZERS)
def test_unstorable_value_is_named_by_its_path(serializer: str, make: Callable[[], Any]) -> None:
    """A value that would not come back as it is raises an error that names the keys leading to it."""
    data = {"fine": 1, "user": {"things": [0, make()]}}
    with pytest.raises(SerializationError, match=re.escape("session['user']['things'][1]")):
        Codec(serializer).encode(data)


PLACES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "list": (lambda bad: [0, bad], "[1]"),
    "tuple": (lambda bad: (0, (bad,)), "[1][0]"),
    "dict": (lambda bad: {"a": {"b": bad}}, "['a']['b']"),
    "dict with an int key": (lambda bad: {7: bad}, "[7]"),
    "OrderedDict": (lambda bad: OrderedDict(a=bad), "['a']"),
    "deque": (lambda bad: deque([0, bad]), "[1]"),
    "beside bytes": (lambda bad: {"raw": b"\x00", "bad": bad}, "['bad']"),
    "key": (lambda bad: {bad: 1}, "[Text('x')]"),
}


@pytest.mark.parametrize(("place", "path"), PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("serializer", EXACT_SERIALIZERS)
def test_path_is_the_one_that_python_would_take(serializer: str, place: Callable[[Any], Any], path: str) -> None:
    """The path in the error is what one writes to reach the value, whatever containers lead there."""

    class Text(str):
        def __repr__(self) -> str:
            return f"Text({super().__repr__()})"

    with pytest.raises(SerializationError) as caught:
        Codec(serializer).encode({"top": place(Text("x"))})
    assert str(caught.value).startswith(f"session['top']{path} cannot be stored")


@pytest.mark.parametrize("serializer", EXACT_SERIALIZERS)
def test_member_of_a_set_is_refused(serializer: str) -> None:
    """What a set holds is looked at too; the path leads to the set."""
    with pytest.raises(SerializationError, match=r"session\['tags'\]"):
        Codec(serializer).encode({"tags": {1, Text("x")}})


def test_nesting_up_to_the_limit_is_stored() -> None:
    """Values may be nested as deep as MAX_DEPTH says, in each serializer alike."""
    value: Any = "bottom"
    for _ in range(MAX_DEPTH - 1):
        value = (value,)
    for serializer in EXACT_SERIALIZERS:
        codec = Codec(serializer)
        assert codec.decode(codec.encode({"deep": value})) == {"deep": value}


@pytest.mark.parametrize("path", ["/put", "/put-now"])
@pytest.mark.parametrize("name", ["object", "generator", "enum", "subclass of str", "list that contains itself"])
@pytest.mark.parametrize("serializer", EXACT_SERIALIZERS)
def test_unstorable_value_is_no_success(
    make_site: Callable[..., Site], caplog: pytest.LogCaptureFixture, serializer: str, name: str, path: str
) -> None:
    """A response whose session cannot be stored is a 500 without a cookie; what was stored is read by the next request."""
    site = make_site(PERSIST_SESSION_SERIALIZER=serializer)
    client = site.app.test_client()
    site.put = {"kept": [1, (2,)]}
    client.get("/put")
    site.put = {"kept": "lost", "bad": UNSTORABLE[name]()}
    answer = client.get(path)
    assert answer.status_code == 500
    assert "Set-Cookie" not in answer.headers
    assert "session['bad']" in caplog.text
    client.get("/take")
    assert exactly(site.taken) == exactly({"kept": [1, (2,)]})


def test_unstorable_value_in_a_new_session_stores_nothing(make_site: Callable[..., Site]) -> None:
    """A new session with a value that cannot be stored leaves no session behind."""
    site = make_site()
    site.put = {"bad": Plain()}
    assert site.app.test_client().get("/put").status_code == 500
    with site.app.app_context():
        assert PersistSession().manager.stats().total == 0


def test_unstorable_value_put_into_a_stored_list(make_site: Callable[..., Site]) -> None:
    """A change inside a nested value that cannot be stored is a 500 as well, and leaves what was stored."""
    site = make_site()
    client = site.app.test_client()
    site.put = {"kept": [1]}
    client.get("/put")
    site.put = {"value": Plain()}
    assert client.get("/append").status_code == 500
    client.get("/take")
    assert site.taken == {"kept": [1]}


def test_handler_of_the_application_answers(make_site: Callable[..., Site]) -> None:
    """An application that handles SerializationError answers in its own way, and still stores nothing."""
    site = make_site()
    client = site.app.test_client()
    site.app.register_error_handler(SerializationError, lambda error: (str(error), 422))
    site.put = {"bad": Plain()}
    answer = client.get("/put")
    assert answer.status_code == 422
    assert "session['bad']" in answer.text
    assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize(
    "metadata",
    [
        {"a": "b", "n": 1, "yes": True, "none": None},
        {"\N{SNOWMAN}": '\x00\x1f\x7f\u2028 \N{GRINNING FACE} "\\/'},
        {"half": "\ud800"},
        {"\ud800": 1},
        {"large": 2**70, "small": -(2**63)},
        {1: "a", 1.5: "b", None: "c"},
        {True: "a"},
        {"list": [1, {"b": [None]}], "float": 1e22, "tuple": (1, 2)},
        {"": ""},
    ],
)
def test_metadata_come_back_as_json_has_them(metadata: dict[Any, Any]) -> None:
    """Whichever way they are written, what is read is what JSON makes of them."""
    assert load_metadata(dump_metadata(MappingProxyType(metadata))) == json.loads(json.dumps(metadata))


@pytest.mark.parametrize(
    "value", [date(2024, 2, 29), b"x", {1}, float("nan"), float("inf"), Decimal(1), {"nested": [date(2024, 2, 29)]}]
)
def test_metadata_that_are_no_json(value: object) -> None:
    """They are refused, whatever the encoders would make of them."""
    with pytest.raises(SerializationError, match="metadata must be JSON"):
        dump_metadata({"plain": "x", "value": value})  # type: ignore[dict-item]


def test_metadata_must_be_json(make_site: Callable[..., Site]) -> None:
    """Metadata that is no JSON is refused, and no session is left behind."""
    with make_site().app.app_context():
        manager = PersistSession().manager
        with pytest.raises(SerializationError, match="metadata"):
            manager.create({}, metadata={"when": date(2024, 2, 29)})
        assert manager.stats().total == 0


# Size -----------------------------------------------------------------------------------------------------------------


def test_too_large_names_the_largest_keys(make_site: Callable[..., Site], caplog: pytest.LogCaptureFixture) -> None:
    """A session above PERSIST_SESSION_MAX_BYTES is a 500 that names its largest keys, the largest first."""
    site = make_site(PERSIST_SESSION_MAX_BYTES=1000)
    site.put = {"small": 1, "large": "x" * 500, "largest": "x" * 600, "middle": "x" * 50}
    assert site.app.test_client().get("/put").status_code == 500
    assert re.search(r"SessionTooLarge.*1,000.*'largest': \d+, 'large': \d+, 'middle': \d+$", caplog.text, re.MULTILINE)
    assert "'small'" not in caplog.text


def test_too_large_leaves_what_was_stored(make_site: Callable[..., Site]) -> None:
    """A session that has grown too large keeps what was stored, and the next request reads it."""
    site = make_site(PERSIST_SESSION_MAX_BYTES=1000)
    client = site.app.test_client()
    site.put = {"kept": [1]}
    client.get("/put")
    site.put = {"kept": "lost", "large": "x" * 1000}
    answer = client.get("/put")
    assert answer.status_code == 500
    assert "Set-Cookie" not in answer.headers
    client.get("/take")
    assert site.taken == {"kept": [1]}


@pytest.mark.parametrize("over", [0, 1])
def test_limit_is_exact(make_site: Callable[..., Site], over: int) -> None:
    """A payload of just PERSIST_SESSION_MAX_BYTES is stored, one byte more is not."""
    size = len(Codec().encode({"text": "x" * 100}))
    site = make_site(PERSIST_SESSION_MAX_BYTES=size)
    site.put = {"text": "x" * (100 + over)}
    assert site.app.test_client().get("/put").status_code == (500 if over else 200)


def test_too_large_after_merging(make_site: Callable[..., Site]) -> None:
    """Two changes that fit alone but not together: the second one fails, the first one stays."""
    with make_site(PERSIST_SESSION_MAX_BYTES=1000).app.app_context():
        manager = PersistSession().manager
        session_id = manager.create({}).id
        first, second = manager.get(session_id), manager.get(session_id)
        assert first is not None
        assert second is not None
        first.data["a"] = "x" * 600
        second.data["b"] = "x" * 600
        manager.save(first)
        with pytest.raises(SessionTooLarge):
            manager.save(second)
        stored = manager.get(session_id)
        assert stored is not None
        assert stored.data == {"a": "x" * 600}


# Pickle ---------------------------------------------------------------------------------------------------------------


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "boom")


def test_pickle_keeps_what_the_others_refuse(make_site: Callable[..., Site]) -> None:
    """Where pickle is configured, enums and dataclasses come back."""
    site = make_site(PERSIST_SESSION_SERIALIZER="pickle")
    client = site.app.test_client()
    site.put = {"value": [Colour.RED, Point(3)]}
    client.get("/put")
    client.get("/take")
    assert site.taken == {"value": [Colour.RED, Point(3)]}


def test_pickle_names_what_it_cannot_store(make_site: Callable[..., Site], caplog: pytest.LogCaptureFixture) -> None:
    """What pickle refuses is named by its path too, and is a 500."""
    site = make_site(PERSIST_SESSION_SERIALIZER="pickle")
    site.put = {"user": {"things": [0, (number for number in range(3))]}}
    assert site.app.test_client().get("/put").status_code == 500
    assert "session['user']['things'][1]" in caplog.text


@pytest.mark.parametrize("serializer", EXACT_SERIALIZERS)
def test_pickle_is_refused_where_it_is_not_configured(serializer: str, tmp_path: Path) -> None:
    """A well signed pickle is never loaded by an application that has another serializer."""
    pickled = Codec("pickle", keys=lambda: ["key"]).encode({"bomb": Bomb(tmp_path / "boom")})
    with pytest.raises(SerializationError, match=r"PERSIST_SESSION_SERIALIZER"):
        Codec(serializer, keys=lambda: ["key"]).decode(pickled)
    assert not (tmp_path / "boom").exists()


def test_bomb_explodes_where_it_is_trusted(tmp_path: Path) -> None:
    """The pickle of these tests does write its file when it is loaded with the right key."""
    codec = Codec("pickle", keys=lambda: ["key"])
    codec.decode(codec.encode({"bomb": Bomb(tmp_path / "boom")}))
    assert (tmp_path / "boom").exists()


TAMPERED: dict[str, Callable[[bytes], bytes]] = {
    "good signature of something else": lambda pickled: (
        Codec("pickle", keys=lambda: ["key"]).encode({}).partition(b".")[0] + b"." + pickled.partition(b".")[2]
    ),
    "no signature": lambda pickled: b"\x03." + pickled.partition(b".")[2],
    "no signature and no dot": lambda pickled: b"\x03" + pickled.partition(b".")[2],
    "signature of zeros": lambda pickled: b"\x03" + b"A" * 43 + b"." + pickled.partition(b".")[2],
    "one byte more": lambda pickled: pickled + b".",
    "one byte changed": lambda pickled: pickled[:-3] + bytes([pickled[-3] ^ 1]) + pickled[-2:],
    "truncated": lambda pickled: pickled[:-1],
    "empty": lambda pickled: b"\x03",
    "signature beyond ASCII": lambda pickled: b"\x03\xff\xfe." + pickled.partition(b".")[2],
}


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_tampered_pickle_is_never_loaded(tmp_path: Path, tamper: Callable[[bytes], bytes]) -> None:
    """A pickle whose signature is not right is refused by the signature, before it is loaded."""
    codec = Codec("pickle", keys=lambda: ["key"])
    pickled = codec.encode({"bomb": Bomb(tmp_path / "boom")})
    with pytest.raises(SerializationError, match="signed"):
        codec.decode(tamper(pickled))
    assert not (tmp_path / "boom").exists()


def test_pickle_of_another_application_is_never_loaded(tmp_path: Path) -> None:
    """A pickle that was signed with the key of another application is refused."""
    pickled = Codec("pickle", keys=lambda: ["other"]).encode({"bomb": Bomb(tmp_path / "boom")})
    with pytest.raises(SerializationError, match="signed"):
        Codec("pickle", keys=lambda: ["key"]).decode(pickled)
    assert not (tmp_path / "boom").exists()


def test_pickle_of_a_fallback_key_is_loaded() -> None:
    """A pickle that was signed before the secret key was rotated is read as long as the old key is a fallback."""
    pickled = Codec("pickle", keys=lambda: ["old"]).encode({"colour": Colour.RED})
    assert Codec("pickle", keys=lambda: ["old", "new"]).decode(pickled) == {"colour": Colour.RED}


def test_tampered_pickle_in_a_request(make_site: Callable[..., Site], tmp_path: Path) -> None:
    """A request that meets a tampered pickle is answered with an empty session, and nothing is loaded."""
    store = open_store("memory://")
    site = make_site(store, PERSIST_SESSION_SERIALIZER="pickle")
    client = site.app.test_client()
    site.put = {"kept": 1}
    client.get("/put")
    [record] = store.scan()
    bomb = Codec("pickle", keys=lambda: ["of the attacker"]).encode({"bomb": Bomb(tmp_path / "boom")})
    store.save(replace(record, data=bomb, version=record.version + 1), expected=record.version)
    site.taken = {"before": True}
    assert client.get("/take").status_code == 200
    assert site.taken == {}
    assert not (tmp_path / "boom").exists()


# Settings -------------------------------------------------------------------------------------------------------------

DURATIONS = ("IDLE_TIMEOUT", "ABSOLUTE_TIMEOUT", "RENEW_INTERVAL", "KEEP_ENDED")
NO_DURATIONS = [-1, -0.5, "soon", "", "5 minutes", "1y", "-5m", "1e3s", math.nan, math.inf, True, [], {}, b"5m"]
NO_DURATIONS += [timedelta(seconds=-1), "9" * 400, 10**400, object]
WRONG: list[tuple[str, Any, str]] = [
    *((name, value, "30m") for name in DURATIONS for value in NO_DURATIONS),
    *((name, value, "more than 0") for name in DURATIONS[:2] for value in (0, 0.0, "0", timedelta())),
    *((name, None, "30m") for name in DURATIONS[2:]),
    *(("MAX_BYTES", value, "bytes") for value in (0, -1, 1.5, "1M", "", None, True, [], math.inf)),
    *(("NO_STORE", value, "True or False") for value in (1, 0, "yes", "", None, [])),
    *(("ENABLED", value, "True or False") for value in (1, 0, "no", "false", None)),
    *(("SERIALIZER", value, "msgpack, json, pickle") for value in ("yaml", "", None, "MSGPACK", 1, [], {"a": 1})),
    *(("STORE", value, "URL") for value in (None, "", 7, Path("sessions.db"))),
]


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG, ids=lambda part: repr(part)[:30])
def test_wrong_setting_is_refused(make_app: MakeApp, name: str, value: Any, allowed: str) -> None:
    """A wrong setting raises when the extension is set up, naming the key, the value and what is allowed."""
    with pytest.raises(ConfigError) as caught:
        make_app(**{f"PERSIST_SESSION_{name}": value})
    message = str(caught.value)
    assert f"PERSIST_SESSION_{name}" in message
    assert repr(value) in message
    assert allowed in message


@pytest.mark.parametrize(
    ("path", "urls"),
    [
        ("/var/lib/x", "file:///var/lib/x for a directory of files, or sqlite:////var/lib/x for a database"),
        ("x.db", "file:x.db for a directory of files, or sqlite:///x.db for a database"),
    ],
)
def test_a_path_in_place_of_a_url_is_explained(make_app: MakeApp, path: str, urls: str) -> None:
    """The message has the URLs that the path may be meant as."""
    with pytest.raises(ConfigError, match=f"^PERSIST_SESSION_STORE: the store '{path}' is a path and no URL; write {urls}"):
        make_app(path)


def test_wrong_setting_is_refused_even_when_switched_off(make_app: MakeApp) -> None:
    """Settings are checked although the extension is not enabled, so that switching it on brings no surprise."""
    with pytest.raises(ConfigError, match="PERSIST_SESSION_MAX_BYTES"):
        make_app(PERSIST_SESSION_ENABLED=False, PERSIST_SESSION_MAX_BYTES=0)


WRONG_URLS = {
    "no scheme": "sessions.db",
    "unknown scheme": "mongodb://localhost/sessions",
    "unknown option": "memory://?speed=high",
    "option without a value": "sqlite:///sessions.db?timeout",
    "option that is no number": "sqlite:///sessions.db?timeout=long",
    "option out of range": "sqlite:///sessions.db?timeout=0",
    "option that is infinite": "redis://localhost?timeout=inf",
    "option that is not one of its words": "sqlite:///sessions.db?synchronous=maybe",
    "flag that is none": "file:sessions?fsync=yes",
    "file on a host": "file://sessions",
    "SQLite in memory": "sqlite:///:memory:",
    "SQLite without a file": "sqlite://",
    "MySQL without a database": "mysql://localhost/",
    "PostgreSQL without a database": "postgresql://localhost",
    "PostgreSQL with a port that is no number": "postgresql://localhost:port/sessions",
    "Redis with a port that is no number": "redis://localhost:port/0",
    "a host that cannot be one": "mysql://db..example.com/sessions",
    "Redis with a port out of range": "redis://localhost:123456/0",
    "Redis with no connections": "redis://localhost/0?max_connections=-1",
    "brackets that do not close": "redis://[::1/0",
    "path that no system has": "file:sessions%00",
}


@pytest.mark.parametrize("url", WRONG_URLS.values(), ids=WRONG_URLS)
def test_wrong_store_url_is_refused(make_app: MakeApp, url: str) -> None:
    """A store URL that cannot work raises when the extension is set up, naming the setting."""
    with pytest.raises(ConfigError, match="PERSIST_SESSION_STORE"):
        make_app(url)


@pytest.mark.parametrize("url", ["mongodb://u:tell-nobody@h/x", "redis://u:tell-nobody@h/0?speed=1"])
def test_wrong_store_url_keeps_the_password(make_app: MakeApp, url: str) -> None:
    """The error of a wrong store URL does not show its password."""
    with pytest.raises(ConfigError) as caught:
        make_app(url)
    assert "tell-nobody" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("PERSIST_SESSION_STOR", "PERSIST_SESSION_STORE"),
        ("PERSIST_SESSION_STORES", "PERSIST_SESSION_STORE"),
        ("PERSIST_SESSION_IDLE_TIME_OUT", "PERSIST_SESSION_IDLE_TIMEOUT"),
        ("PERSIST_SESSION_ABSOLUTE_TIMOUT", "PERSIST_SESSION_ABSOLUTE_TIMEOUT"),
        ("PERSIST_SESSION_SERIALISER", "PERSIST_SESSION_SERIALIZER"),
        ("PERSIST_SESSION_MAXBYTES", "PERSIST_SESSION_MAX_BYTES"),
        ("PERSIST_SESSION_RENEWAL_INTERVAL", "PERSIST_SESSION_RENEW_INTERVAL"),
        ("PERSIST_SESSION_enabled", "PERSIST_SESSION_ENABLED"),
    ],
)
def test_unknown_setting_suggests_the_nearest(make_app: MakeApp, wrong: str, near: str) -> None:
    """A setting that does not exist raises and suggests the one that was meant."""
    with pytest.raises(ConfigError, match=rf"{wrong}\b.*did you mean {near}\?"):
        make_app(**{wrong: "x"})


def test_idle_timeout_beyond_the_calendar_is_refused(make_app: MakeApp) -> None:
    """A timeout that no cookie's date can express is refused at once, not by each response of a permanent session."""
    with pytest.raises(ConfigError, match="PERSIST_SESSION_IDLE_TIMEOUT"):
        make_app(PERSIST_SESSION_IDLE_TIMEOUT=10**12)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (90, 90.0),
        (0.5, 0.5),
        (timedelta(minutes=30), 1800.0),
        ("90", 90.0),
        ("45s", 45.0),
        ("30m", 1800.0),
        ("1.5h", 5400.0),
        (" 24 H ", 86400.0),
        ("7d", 604800.0),
        ("2w", 1209600.0),
    ],
)
@pytest.mark.parametrize("name", DURATIONS)
def test_durations_are_read(make_app: MakeApp, name: str, value: Any, seconds: float) -> None:
    """A duration is a number of seconds, a timedelta, or text with a unit."""
    with make_app(**{f"PERSIST_SESSION_{name}": value}).app_context():
        assert getattr(PersistSession().config, name.lower()) == seconds


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("IDLE_TIMEOUT", "30m", 1800.0),
        ("IDLE_TIMEOUT", "1800", 1800.0),
        ("IDLE_TIMEOUT", "0.5", 0.5),
        ("ABSOLUTE_TIMEOUT", "null", None),
        ("RENEW_INTERVAL", "0", 0.0),
        ("KEEP_ENDED", "24h", 86400.0),
        ("MAX_BYTES", "4096", 4096),
        ("NO_STORE", "true", True),
        ("SERIALIZER", "json", "json"),
        ("STORE", "memory://", "memory://"),
    ],
)
def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: Any) -> None:
    """Each setting can be an environment variable, as Flask reads them."""
    monkeypatch.setenv("FLASK_PERSIST_SESSION_STORE", "memory://")
    monkeypatch.setenv(f"FLASK_PERSIST_SESSION_{name}", text)
    app = Flask("tested")
    app.config.from_prefixed_env()
    sessions = PersistSession(app)
    with app.app_context():
        assert getattr(sessions.config, name.lower()) == value


@pytest.mark.parametrize(("name", "text"), [("MAX_BYTES", "1M"), ("NO_STORE", "yes"), ("IDLE_TIMEOUT", "true")])
def test_wrong_environment_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    """A wrong environment variable raises when the extension is set up."""
    monkeypatch.setenv(f"FLASK_PERSIST_SESSION_{name}", text)
    app = Flask("tested")
    app.config.from_prefixed_env()
    with pytest.raises(ConfigError, match=f"PERSIST_SESSION_{name}"):
        PersistSession(app)
