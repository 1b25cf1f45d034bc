"""A store that counts what is asked of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from flask_persist_session import HistoryLog, SessionStore


def _counted(name: str) -> Callable[..., Any]:
    def operation(self: CountingStore, *arguments: Any, **options: Any) -> Any:
        self.operations[name] += 1
        return getattr(self.store, name)(*arguments, **options)

    return operation


class CountingStore(SessionStore):
    """Delegates to *store* and counts its operations by name; ``operations.clear()`` starts anew."""

    def __init__(self, store: SessionStore) -> None:
        self.store = store
        self.writers = store.writers
        self.atomic = store.atomic
        self.operations: Counter[str] = Counter()

    get = _counted("get")
    save = _counted("save")
    delete = _counted("delete")
    scan = _counted("scan")
    find = _counted("find")
    count = _counted("count")
    stats = _counted("stats")
    save_many = _counted("save_many")
    delete_many = _counted("delete_many")
    lease = _counted("lease")
    note = _counted("note")
    noted = _counted("noted")
    transaction = _counted("transaction")
    check = _counted("check")
    optimize = _counted("optimize")

    @property
    def history(self) -> HistoryLog:
        return self.store.history

    def namespace(self, name: str) -> CountingStore:
        return CountingStore(self.store.namespace(name))

    def close(self) -> None:
        self.store.close()
