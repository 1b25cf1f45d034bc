"""The layers of the package: a module imports only from lower ones, and each driver only in the module of its store."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flask_persist_session

PACKAGE = Path(flask_persist_session.__file__).parent
LAYERS = {
    "version": 0,
    "records": 0,
    "exceptions": 0,
    "serializers": 1,
    "envelope": 1,
    "tokens": 1,
    "signals": 1,
    "config": 1,
    "stores": 1,
    "lifetime": 1,
    "record_lines": 1,
    "announcer": 2,
    "monthly_archive": 2,
    "stored": 2,
    "caps": 2,
    "cleanup": 2,
    "migrate": 3,
    "lookup": 2,
    "lifecycle": 2,
    "creating": 2,
    "editing": 2,
    "transaction": 2,
    "ending": 2,
    "history": 2,
    "users": 2,
    "adopting": 2,
    "revoking": 2,
    "manager": 2,
    "session": 2,
    "archive": 2,
    "backup_files": 3,
    "backup": 3,
    "auto_backup": 3,
    "interface": 3,
    "sweeper": 3,
    "origins": 3,
    "upgrade": 3,
    "upkeep": 3,
    "extension": 4,
    "cli": 4,
    "cli_upkeep": 4,
    "describe": 4,
    "terminal": 4,
    "web": 4,
    "cli_import": 4,
    "cli_migrate": 4,
    "cli_backup": 4,
    "__init__": 5,
    "testing": 5,
}
#: Modules of one layer that may know each other, the first one the second.
SIBLINGS = {
    ("session", "manager"),
    ("session", "stored"),
    ("session", "lifecycle"),
    ("lifecycle", "announcer"),
    ("lifecycle", "stored"),
    ("lifecycle", "caps"),
    ("lifecycle", "cleanup"),
    ("lifecycle", "lookup"),
    ("exceptions", "records"),
    ("creating", "lifecycle"),
    ("creating", "stored"),
    ("editing", "creating"),
    ("editing", "lifecycle"),
    ("editing", "cleanup"),
    ("editing", "stored"),
    ("transaction", "creating"),
    ("transaction", "editing"),
    ("transaction", "lifecycle"),
    ("transaction", "stored"),
    ("history", "stored"),
    ("manager", "transaction"),
    ("manager", "ending"),
    ("ending", "lifecycle"),
    ("ending", "cleanup"),
    ("ending", "stored"),
    ("manager", "history"),
    ("manager", "stored"),
    ("manager", "lifecycle"),
    ("users", "lifecycle"),
    ("users", "stored"),
    ("adopting", "users"),
    ("adopting", "lifecycle"),
    ("adopting", "stored"),
    ("revoking", "lifecycle"),
    ("revoking", "cleanup"),
    ("revoking", "stored"),
    ("manager", "adopting"),
    ("manager", "revoking"),
    ("manager", "cleanup"),
    ("manager", "lookup"),
    ("cleanup", "announcer"),
    ("backup", "backup_files"),
    ("auto_backup", "backup"),
    ("auto_backup", "backup_files"),
    ("auto_backup", "sweeper"),
    ("record_lines", "serializers"),
    ("record_lines", "stores"),
    ("monthly_archive", "archive"),
    ("lifetime", "config"),
    ("config", "serializers"),
    ("config", "envelope"),
    ("serializers", "envelope"),
    ("config", "stores"),
    ("stores", "serializers"),
    ("stores", "tokens"),
    ("upgrade", "origins"),
    ("extension", "cli"),
    ("extension", "cli_import"),
    ("extension", "cli_migrate"),
    ("cli_migrate", "cli"),
    ("cli_migrate", "terminal"),
    ("cli_import", "terminal"),
    ("extension", "cli_backup"),
    ("cli_backup", "cli"),
    ("cli_backup", "terminal"),
    ("extension", "cli_upkeep"),
    ("cli_upkeep", "cli"),
    ("cli_upkeep", "extension"),
    ("cli_upkeep", "terminal"),
    ("cli", "extension"),
    ("cli", "describe"),
    ("cli", "terminal"),
    ("describe", "terminal"),
    ("web", "extension"),
    ("cli_import", "cli"),
    ("cli_import", "extension"),
}
DRIVERS = {
    "peewee": {"stores.sql", "stores.databases", "stores.mysql", "stores.sql_upkeep", "origins"},
    "pymysql": {"stores.mysql"},
    "redis": {"stores.redis", "stores.redis_clients", "stores.redis_cluster", "origins"},
    "pymemcache": {"origins"},
    "cachelib": {"stores.cachelib", "stores.cached"},
    "msgspec": {"record_lines", "serializers"},
    "ormsgpack": {"serializers"},
    "cryptography": {"envelope"},
    "zstandard": {"envelope"},
    "isal": {"archive"},
    "ua_parser": {"web.devices"},
    "pydantic": {"web.api_schemas"},
}
OPTIONAL = (
    "redis",
    "psycopg",
    "psycopg2",
    "pymysql",
    "ua_parser",
    "pydantic",
    "cryptography",
    "zstandard",
    "isal",
    "hypothesis",
    "pytest",
)
#: Which layers may import what of Flask.
FLASK_FROM = 2


def _modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def _imports(path: Path) -> Iterator[str]:
    """Absolute names of what a module imports, at its top or anywhere within."""
    package = ["flask_persist_session", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ([base] if node.module else [f"{base}.{alias.name}" for alias in node.names])


def _part(name: str) -> str:
    return name.removeprefix("flask_persist_session").lstrip(".").split(".")[0]


@pytest.mark.parametrize("path", _modules(), ids=_name)
def test_a_module_imports_only_from_lower_layers(path: Path) -> None:
    """No module imports one of its own or a higher layer."""
    here = _name(path).split(".")[0]
    used = {_part(name) for name in _imports(path) if name.startswith("flask_persist_session.")}
    wrong = {other for other in used if other in LAYERS and other != here and LAYERS[other] >= LAYERS[here]}
    assert {other for other in wrong if (here, other) not in SIBLINGS} == set()


@pytest.mark.parametrize("path", _modules(), ids=_name)
def test_every_module_has_a_layer(path: Path) -> None:
    """A module that is added is given its place."""
    assert _name(path).split(".")[0] in LAYERS


@pytest.mark.parametrize("path", _modules(), ids=_name)
def test_a_driver_is_imported_only_in_the_module_of_its_store(path: Path) -> None:
    """peewee, redis and cachelib are known to the modules of their stores alone."""
    tops = {name.split(".")[0] for name in _imports(path)}
    assert {driver for driver in tops & DRIVERS.keys() if _name(path) not in DRIVERS[driver]} == set()


@pytest.mark.parametrize("path", sorted((PACKAGE / "stores").glob("*.py")), ids=_name)
def test_no_store_imports_flask_or_another_store(path: Path) -> None:
    """A store knows the contract, and neither Flask nor its siblings."""
    names = set(_imports(path))
    assert not {name for name in names if name.split(".")[0] in ("flask", "werkzeug", "click")}
    others = {
        f"flask_persist_session.stores.{module}" for module in ("memory", "file", "sql", "redis", "cachelib", "cached")
    }
    allowed = {"flask_persist_session.stores.cachelib"} if path.name == "__init__.py" else set()
    assert names & others <= allowed


@pytest.mark.parametrize("path", _modules(), ids=_name)
def test_the_lower_layers_do_without_flask(path: Path) -> None:
    """Records, stores, serializers and tokens can be used where there is no Flask."""
    name = _name(path).split(".")[0]
    if LAYERS[name] < FLASK_FROM:
        assert not {used for used in _imports(path) if used.split(".")[0] in ("flask", "click")}


def test_only_the_manager_sends_signals() -> None:
    """No module but the manager's announcer calls ``send``."""
    senders = {_name(path) for path in _modules() if ".send(self._sender" in path.read_text(encoding="utf-8")}
    assert senders == {"announcer"}


def test_importing_the_package_needs_no_optional_driver() -> None:
    """``import flask_persist_session`` works where no driver is installed."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{blocked}; import flask_persist_session"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
