"""What a browser, or somebody who pretends to be one, sends in place of a cookie that this server made."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import Callable

import pytest
from flask import Flask, session
from itsdangerous import TimestampSigner
from werkzeug.test import TestResponse

from flask_persist_session import PersistSession, open_store
from tests.conftest import Clock
from tests.counting import CountingStore

MakeApp = Callable[..., Flask]


@pytest.fixture
def counting() -> CountingStore:
    return CountingStore(open_store("memory://"))


def with_views(app: Flask, clock: Clock) -> Flask:
    with app.app_context():
        PersistSession().manager.clock = clock

    @app.get("/read")
    def read() -> dict[str, object]:
        return {"id": session.id, "name": session.get("name")}

    @app.get("/write/<name>")
    def write(name: str) -> str:
        session["name"] = name
        return name

    @app.get("/untouched")
    def untouched() -> str:
        return "no session"

    return app


@pytest.fixture
def app(make_app: MakeApp, counting: CountingStore, clock: Clock) -> Flask:
    return with_views(make_app(counting), clock)


def send(app: Flask, path: str, *cookies: str) -> TestResponse:
    """Ask for *path* with just these values of the session cookie, byte for byte."""
    header = "; ".join(f"session={value}" for value in cookies)
    return app.test_client(use_cookies=False).get(path, environ_overrides={"HTTP_COOKIE": header})


def cookie_in(answer: TestResponse) -> str:
    """The value of the session cookie that *answer* sets."""
    return answer.headers["Set-Cookie"].removeprefix("session=").partition(";")[0]


@pytest.fixture
def good(app: Flask, counting: CountingStore) -> str:
    """The cookie of a stored session; what it cost to make is not counted."""
    value = cookie_in(send(app, "/write/Ada"))
    counting.operations.clear()
    return value


def forge(good: str, seconds: int) -> str:
    """The good cookie with another time and its old signature."""
    token, _, signature = good.split(".")
    stamp = urlsafe_b64encode(seconds.to_bytes(8, "big").lstrip(b"\0")).rstrip(b"=").decode()
    return f"{token}.{stamp}.{signature}"


def signed_with(key: str, salt: str = "flask-persist-session.token") -> Callable[[str], str]:
    """Signs the token of a good cookie once more, with another key or for another purpose."""

    def sign(good: str) -> str:
        return TimestampSigner(key, salt=salt).sign(good.split(".")[0]).decode()

    return sign


JUNK: dict[str, Callable[[str], str]] = {
    "empty": lambda good: "",
    "blank": lambda good: '"  "',
    "dots": lambda good: "..",
    "huge": lambda good: "A" * 100_000,
    "huge with dots": lambda good: "." * 100_000,
    "good one followed by much": lambda good: good + "A" * 1000,
    "token alone": lambda good: good.split(".")[0],
    "token and time": lambda good: good.rpartition(".")[0],
    "without the last character": lambda good: good[:-1],
    "without the first character": lambda good: good[1:],
    "signature of another": lambda good: f"{good.rpartition('.')[0]}.{'A' * 43}",
    "signature that is no base64": lambda good: f"{good.rpartition('.')[0]}.!!!",
    "without a signature": lambda good: f"{good.rpartition('.')[0]}.",
    "key of another application": signed_with("the secret of somebody else"),
    "purpose of another cookie": signed_with("a secret for tests", salt="cookie-session"),
    "binary": lambda good: "\xff\x00\xfe\x01\x80",
    "quoted binary": lambda good: '"\\377\\000\\376"',
    "letters beyond ASCII": lambda good: "ключ.ключ.ключ".encode().decode("latin-1"),
    "time beyond ASCII": lambda good: f"{good.split('.')[0]}.\xe9\xe9.{good.split('.')[2]}",
    "time that is no base64": lambda good: f"{good.split('.')[0]}.%%%.{good.split('.')[2]}",
    "time long ago": lambda good: forge(good, 1),
    "time far ahead": lambda good: forge(good, 2**62),
    "time beyond every number": lambda good: f"A.{'_' * 190}.A",
    "path": lambda good: "../../../../etc/passwd",
    "SQL": lambda good: "'OR'1'='1",
    "Flask's own session": lambda good: "eyJuYW1lIjoiQWRhIn0.ZVcuAA.AAAAAAAAAAAAAAAAAAAAAAAAAAA",
}


@pytest.fixture(params=JUNK.values(), ids=JUNK)
def junk(request: pytest.FixtureRequest, good: str) -> str:
    return str(request.param(good))


@pytest.mark.parametrize("path", ["/read", "/untouched"])
def test_junk_costs_no_store_operation(app: Flask, counting: CountingStore, junk: str, path: str) -> None:
    """A cookie that this server did not sign is refused before the store is asked."""
    send(app, path, junk)
    assert not counting.operations


@pytest.mark.parametrize("path", ["/read", "/untouched"])
def test_junk_is_answered(app: Flask, junk: str, path: str) -> None:
    """A request with a junk cookie is answered as one without a cookie."""
    answer = send(app, path, junk)
    assert answer.status_code == 200
    assert answer.data == send(app, path).data


def test_junk_is_left_alone(app: Flask, junk: str) -> None:
    """A request that only reads sets no cookie in place of junk."""
    assert "Set-Cookie" not in send(app, "/read", junk).headers


def test_junk_is_replaced_by_a_session_of_the_servers_choice(app: Flask, junk: str, good: str) -> None:
    """Writing to the session of a junk cookie starts a new one under a new id and token."""
    new = cookie_in(send(app, "/write/Eve", junk))
    assert new.split(".")[0] not in {junk.split(".")[0], good.split(".")[0]}
    assert send(app, "/read", new).json["name"] == "Eve"
    assert send(app, "/read", good).json["name"] == "Ada"


def test_no_cut_is_taken(app: Flask, counting: CountingStore, good: str) -> None:
    """However short a cookie is cut, it opens nothing and costs no store operation."""
    names = {send(app, "/read", good[:length]).json["name"] for length in range(len(good))}
    assert names == {None}
    assert not counting.operations


def test_no_changed_character_is_taken(app: Flask, counting: CountingStore, good: str) -> None:
    """Whichever character of the token or the time is changed, the cookie opens nothing and costs no store operation."""
    signed = len(good.rpartition(".")[0])
    swapped = [good[:place] + ("A" if good[place] != "A" else "B") + good[place + 1 :] for place in range(signed)]
    names = {send(app, "/read", value).json["name"] for value in swapped}
    assert names == {None}
    assert not counting.operations


def test_untouched_session_of_a_good_cookie_costs_nothing(app: Flask, counting: CountingStore, good: str) -> None:
    """A request that does not touch the session costs no store operation, even with a good cookie."""
    send(app, "/untouched", good)
    assert not counting.operations


# Ids ------------------------------------------------------------------------------------------------------------------


def test_unknown_id_is_asked_for_once(make_app: MakeApp, app: Flask, good: str, clock: Clock) -> None:
    """A good signature over an id that the store does not know costs one look-up and gives an empty session."""
    elsewhere = CountingStore(open_store("memory://"))
    answer = send(with_views(make_app(elsewhere), clock), "/read", good)
    assert answer.json == {"id": None, "name": None}
    assert elsewhere.operations == {"get": 1}


def test_unknown_id_is_never_adopted(make_app: MakeApp, app: Flask, good: str, clock: Clock) -> None:
    """Writing to the session of an unknown id with a good signature gives it another id and token."""
    other = with_views(make_app("memory://"), clock)
    known = send(app, "/read", good).json["id"]
    new = cookie_in(send(other, "/write/Eve", good))
    assert new.split(".")[0] != good.split(".")[0]
    assert send(other, "/read", new).json["id"] != known
    assert send(other, "/read", good).json == {"id": None, "name": None}


def test_session_id_is_no_cookie(app: Flask, counting: CountingStore, good: str) -> None:
    """The public id of a session, signed as a token with the right key, opens nothing."""
    public = send(app, "/read", good).json["id"]
    with app.app_context():
        assert PersistSession().manager.get(public) is not None
    answer = send(app, "/read", signed_with("a secret for tests")(public))
    assert answer.json == {"id": None, "name": None}


# Keys -----------------------------------------------------------------------------------------------------------------


def rotate(app: Flask, *fallbacks: str) -> None:
    app.secret_key = "a newer secret for tests"
    app.config["SECRET_KEY_FALLBACKS"] = list(fallbacks)


def test_retired_key_is_refused(app: Flask, counting: CountingStore, good: str) -> None:
    """A cookie signed with a key that is in use no more costs no store operation and opens nothing."""
    rotate(app)
    assert send(app, "/read", good).json["name"] is None
    assert not counting.operations


def test_fallback_key_is_taken(app: Flask, good: str) -> None:
    """A cookie signed with a key of SECRET_KEY_FALLBACKS opens its session, and is left as it is until its renewal."""
    rotate(app, "a secret for tests")
    answer = send(app, "/read", good)
    assert answer.json["name"] == "Ada"
    assert "Set-Cookie" not in answer.headers


def test_renewal_signs_with_the_current_key(app: Flask, good: str, clock: Clock) -> None:
    """At its renewal a cookie of a fallback key is signed with the current key, for the same session."""
    rotate(app, "a secret for tests")
    clock.advance(61)
    renewed = cookie_in(send(app, "/read", good))
    app.config["SECRET_KEY_FALLBACKS"] = []
    assert send(app, "/read", good).json["name"] is None
    assert send(app, "/read", renewed).json["name"] == "Ada"


def test_no_key_means_no_session(app: Flask, counting: CountingStore, good: str) -> None:
    """Without a secret key a cookie costs no store operation: the session is Flask's null session."""
    app.secret_key = None
    assert send(app, "/untouched", good).status_code == 200
    assert not counting.operations


# Several cookies of one name -----------------------------------------------------------------------------------------


def test_junk_before_the_good_cookie_is_passed_over(app: Flask, counting: CountingStore, junk: str, good: str) -> None:
    """Of several cookies the first with a good signature counts, with one look-up."""
    assert send(app, "/read", junk, good).json["name"] == "Ada"
    assert counting.operations == {"get": 1}


def test_junk_after_the_good_cookie_is_passed_over(app: Flask, counting: CountingStore, junk: str, good: str) -> None:
    """Junk behind a cookie with a good signature changes nothing."""
    assert send(app, "/read", good, junk).json["name"] == "Ada"
    assert counting.operations == {"get": 1}


def test_first_of_two_good_cookies_counts(app: Flask, good: str) -> None:
    """Of two cookies with good signatures the first one counts, whatever the other holds."""
    second = cookie_in(send(app, "/write/Grace"))
    names = [send(app, "/read", *pair).json["name"] for pair in ((good, second), (second, good))]
    assert names == ["Ada", "Grace"]


def test_many_cookies_are_not_all_verified(app: Flask, counting: CountingStore, good: str) -> None:
    """A flood of cookies is answered with an empty session and costs no store operation."""
    assert send(app, "/read", *["A.AAAA.A"] * 1000, good).status_code == 200
    assert not counting.operations


# The time in the cookie -----------------------------------------------------------------------------------------------


def test_forged_old_time_beside_the_good_cookie_renews_nothing(app: Flask, counting: CountingStore, good: str) -> None:
    """A forged old time beside a good cookie that is not due causes no write."""
    send(app, "/read", forge(good, 1), good)
    assert counting.operations == {"get": 1}


def test_forged_new_time_beside_the_good_cookie_does_not_stop_renewals(
    app: Flask, counting: CountingStore, good: str, clock: Clock
) -> None:
    """A forged time ahead of ours beside a good cookie does not keep its session from being renewed."""
    clock.advance(61)
    assert "Set-Cookie" in send(app, "/read", forge(good, 2**40), good).headers
    assert counting.operations == {"get": 1, "save": 1}


def test_due_cookie_costs_one_renewal(app: Flask, counting: CountingStore, good: str, clock: Clock) -> None:
    """A good cookie whose renewal is due costs a look-up and a save, even where the session is not touched."""
    clock.advance(61)
    send(app, "/untouched", good)
    assert counting.operations == {"get": 1, "save": 1}
