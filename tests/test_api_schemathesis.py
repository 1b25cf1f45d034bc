"""The HTTP API does what its OpenAPI document says, whatever it is sent."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import schemathesis
from flask import Flask
from schemathesis import engine
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events

from flask_persist_session import PersistSession
from flask_persist_session.web.api import api_blueprint
from flask_persist_session.web.api_openapi import OPERATIONS

#: Other examples: API_SEED=1 python -m pytest tests/test_api_schemathesis.py
SEED = int(os.environ.get("API_SEED", "20250101"))
#: Statuses of the API that schemathesis does not take for granted.
CHECKS = {
    "missing_required_header": {"expected-statuses": [422, 428]},
    "positive_data_acceptance": {"expected-statuses": ["2xx", 304, 404, 409, 410, 412]},
    "negative_data_rejection": {"expected-statuses": [400, 404, 405, 412, 415, 422, 428]},
}


@pytest.fixture(params=["memory", pytest.param("sqlite", marks=pytest.mark.soak)])
def app(request: pytest.FixtureRequest, make_app: Callable[..., Flask], new_url: Callable[[str], str]) -> Flask:
    app: Flask = make_app(new_url(request.param), TESTING=False)
    PersistSession().namespace("chat", app=app)
    app.register_blueprint(api_blueprint(lambda *asked: True), url_prefix="/api")
    return app


@schemathesis.hook
def before_call(context: object, case: schemathesis.Case, kwargs: object) -> None:
    """Leave a cursor out where a request is to be valid: nobody guesses one, it is what a page gave."""
    if case.meta is not None and case.meta.generation.mode.is_positive and case.query:
        case.query.pop("cursor", None)


def run(app: Flask) -> Iterator[events.EngineEvent]:
    """Try the API: the examples of its document, each limit of its models, requests at random, and chains of requests."""
    print(f"API_SEED={SEED}")
    generation = {"max-examples": 5, "deterministic": True, "database": "none"}
    config = SchemathesisConfig.from_dict({"seed": SEED, "generation": generation, "checks": CHECKS})
    schema = schemathesis.openapi.from_wsgi("/api/openapi.json", app, config=config)
    yield from engine.from_schema(schema).execute()


def test_whatever_is_sent_is_answered_as_the_document_says(app: Flask) -> None:
    """Requests that are valid or not, alone or in a row, get a documented status, body and headers, and no crash."""
    failures, successes = [], set()
    for event in run(app):
        if isinstance(event, events.NonFatalError | events.FatalError):
            failures.append(str(event))
        if isinstance(event, events.ScenarioFinished):
            recorder = event.recorder
            for case_id, checks in recorder.checks.items():
                wrong = [check.failure_info for check in checks if check.failure_info]
                failures += [f"{event.phase} {info.failure}\n{info.code_sample}" for info in wrong]
                if recorder.interactions[case_id].response.status_code < 300:
                    successes.add(recorder.cases[case_id].value.operation.definition.raw["operationId"])
    assert not failures, "\n\n".join(failures)
    assert successes == {operation.name for operation in OPERATIONS} - {"openapi"}  # which was read before
