"""A MariaDB or MySQL server for the tests, which no package of PyPI brings.

``python -m tests.database`` looks for one, and gets one where there is none.
"""

from __future__ import annotations

import os
import sys

from tests.packages import install
from tests.servers import MySQLServer

PACKAGE = "mariadb-server-core"
HOW = f"Get one with the package {PACKAGE} of the system (“apt-get install {PACKAGE}”), and run the tests again."


def main() -> int:
    """Say what there is; without any, fail only in CI, because elsewhere the other tests are worth running."""
    if MySQLServer.program() is None:
        install(PACKAGE)
    if (program := MySQLServer.program()) is None:
        print(f"There is no MariaDB or MySQL server here. {HOW}", file=sys.stderr)
        return 1 if os.environ.get("CI") else 0
    print(f"The tests of MySQL use {program}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
