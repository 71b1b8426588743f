"""Real servers for tests, on free ports of the loopback: PostgreSQL, and Ceph's S3 gateway.

Everything a server writes lies in a folder of its own below the temporary directory, and every
process dies with this one. Debian's packages are needed: `.ci/services` installs them.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

# A loaded machine is five times slower than an idle one, where the gateway needs 13 seconds.
_START_SECONDS = 180.0
# Seen once in some twenty starts: the gateway hung for ever. Another start then takes 13 seconds.
_CEPH_TRIES, _CEPH_SECONDS = 3, 75.0
_LOG = logging.getLogger(__name__)
_REGION = "us-east-1"


class ServerMissing(RuntimeError):  # noqa: N818 (the name says what is the matter)
    """A program that a server needs is not installed."""


class ServerFailed(RuntimeError):  # noqa: N818
    """A server was started and does not answer."""


def program(name: str, hint: str = "") -> str:
    """The path of a program, also where Debian hides those of PostgreSQL.

    Raises:
        ServerMissing: naming the package.
    """
    hidden = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    found = shutil.which(name) or (str(hidden[0]) if hidden else None)
    if found is None:
        raise ServerMissing(
            f"{name} is not installed{f' (package {hint})' if hint else ''}; .ci/services does it"
        )
    return found


def free_port() -> int:
    """A port of the loopback that nobody listens on now.

    Below the ports that the system hands out to outgoing connections (32768 and up on Linux), so
    that none of those takes it before the server does.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def wait_until(what: str, ready: Callable[[], bool], seconds: float = _START_SECONDS) -> None:
    """Return when `ready()` is true. Raises ServerFailed when that takes too long."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise ServerFailed(f"{what}: no answer within {seconds:g} s")
        time.sleep(0.1)


def answers_http(url: str) -> bool:
    """Whether anything answers HTTP there, even with a refusal."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        error.close()
    except OSError:
        return False
    return True


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1  # prctl(2)
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def start(
    command: list[str], log: Path, *, user: str | None = None, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a server in the foreground; it dies when this process does.

    Args:
        user: run as that user (only root can).
    """
    with open(log, "ab") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=dict(env) if env is not None else None,
            user=user,
            group=user,
            extra_groups=[] if user else None,
            cwd=log.parent,
            process_group=0,
            preexec_fn=_die_with_parent,
        )


def stop(process: subprocess.Popen[bytes], grace: float = 10) -> None:
    """End a server and its process group: a request first, then by force."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            continue
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _run(command: list[str], user: str | None = None, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        user=user,
        group=user,
        extra_groups=[] if user else None,
        env={**os.environ, **(env or {})},
        cwd="/",
        timeout=_START_SECONDS,
    )
    if done.returncode:
        raise ServerFailed(f"{' '.join(command[:2])} failed:\n{done.stdout[-2000:]}")
    return done.stdout


@contextlib.contextmanager
def _scratch(name: str) -> Iterator[Path]:
    # Not below pytest's own folder, which no other user may enter.
    folder = Path(tempfile.mkdtemp(prefix=f"regrow-{name}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- PostgreSQL ---


@dataclass(frozen=True)
class Postgres:
    """A running PostgreSQL."""

    port: int
    password: str
    user: str = "regrow"

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"db_{uuid.uuid4().hex[:12]}"
        place = ["-h", "127.0.0.1", "-p", str(self.port), "-U", self.user]
        _run([program("createdb"), *place, name], env={"PGPASSWORD": self.password})
        return f"postgresql://{self.user}:{self.password}@127.0.0.1:{self.port}/{name}"


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL of its own; it refuses to run as root, so then it runs as `postgres`.

    Raises:
        ServerMissing: when it is not installed.
        ServerFailed: when it does not start.
    """
    initdb, server = program("initdb", "postgresql"), program("postgres", "postgresql")
    user = "postgres" if os.geteuid() == 0 else None
    made = Postgres(free_port(), secrets.token_hex(12))
    with _scratch("postgres") as folder:
        secret = folder / "password"
        secret.write_text(made.password)
        if user is not None:
            for path in (folder, secret):
                os.chown(path, pwd.getpwnam(user).pw_uid, -1)
        data, words = folder / "data", ["-U", made.user, "--pwfile", str(secret)]
        _run(
            [initdb, "-D", str(data), *words, "--auth=scram-sha-256", "-E", "UTF8", "--no-sync"],
            user=user,
        )
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": made.port,
            "unix_socket_directories": folder,
            "max_connections": 300,
            "fsync": "off",
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        process = start([server, "-D", str(data), *options], folder / "log", user=user)
        try:
            _wait_for(process, folder / "log", "PostgreSQL", lambda: _accepts(made.port))
            yield made
        finally:
            process.send_signal(signal.SIGQUIT)  # at once, without waiting for its clients
            stop(process)


def _accepts(port: int) -> bool:
    command = [program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    return subprocess.run(command).returncode == 0


def _wait_for(
    process: subprocess.Popen[bytes],
    log: Path,
    name: str,
    ready: Callable[[], bool],
    seconds: float = _START_SECONDS,
) -> None:
    def ready_or_dead() -> bool:
        return ready() or process.poll() is not None

    try:
        wait_until(name, ready_or_dead, seconds)
        if process.poll() is not None:
            raise ServerFailed(f"{name} ended with {process.returncode}")
    except ServerFailed as failure:
        tail = log.read_text(errors="replace")[-2000:] if log.is_file() else ""
        raise ServerFailed(f"{failure}\n{tail}") from failure


# --- SFTP ---


@dataclass(frozen=True)
class SshServer:
    """A running sshd, for the user that this process is."""

    port: int
    home: Path
    """A home directory with the key that it lets in; paramiko looks for it in `$HOME`."""
    pid: int = 0

    def url(self, path: Path) -> str:
        """A directory of this machine as that server gives it."""
        user = pwd.getpwuid(os.geteuid()).pw_name
        return f"sftp://{user}@127.0.0.1:{self.port}{path}"


_SSHD_CONF = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/allowed
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
"""


@contextlib.contextmanager
def sshd() -> Iterator[SshServer]:
    """OpenSSH's server with a host key and a user's key of its own.

    Raises:
        ServerMissing: when it is not installed.
        ServerFailed: when it does not start.
    """
    server = shutil.which("sshd") or "/usr/sbin/sshd"
    if not Path(server).exists():
        raise ServerMissing("sshd is not installed (package openssh-server)")
    with _scratch("sshd") as folder:
        made = SshServer(free_port(), folder / "home")
        (made.home / ".ssh").mkdir(parents=True)
        key = made.home / ".ssh" / "id_ed25519"
        for path in (folder / "host_key", key):
            _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)])
        shutil.copyfile(key.with_suffix(".pub"), folder / "allowed")
        conf = folder / "sshd_config"
        conf.write_text(_SSHD_CONF.format(folder=folder, port=made.port))
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where it gives up its rights
        process = start([server, "-D", "-e", "-f", str(conf)], folder / "log")
        try:
            _wait_for(process, folder / "log", "sshd", lambda: _listens(made.port))
            yield replace(made, pid=process.pid)
        finally:
            stop(process, 1)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


# --- S3 ---


@dataclass(frozen=True)
class Bucket:
    """An S3 bucket and the way to it."""

    name: str
    endpoint: str
    access_key: str
    secret_key: str

    @property
    def url(self) -> str:
        """The bucket as a URL, `s3://<name>`."""
        return f"s3://{self.name}"

    @property
    def env(self) -> dict[str, str]:
        """The variables that lead Regrow (and every other S3 client) there, store included."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": _REGION,
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
            "REGROW_STORE": f"{self.url}/store",
        }


@dataclass(frozen=True)
class S3Server:
    """A running S3 server with one user."""

    endpoint: str
    access_key: str = field(default_factory=lambda: f"K{secrets.token_hex(10).upper()}")
    secret_key: str = field(default_factory=lambda: secrets.token_hex(20))
    ceph_conf: Path | None = None

    def limit_bytes(self, bucket: Bucket, size: int) -> None:
        """Let no more than `size` bytes into a bucket."""
        command = [program("radosgw-admin"), "-c", str(self.ceph_conf), "quota"]
        words = ["--quota-scope=bucket", f"--bucket={bucket.name}"]
        _run([*command, "set", *words, f"--max-size={size}"])
        _run([*command, "enable", *words])

    def client(self):
        """A boto3 client, for looking behind Regrow's back."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=_REGION,
        )

    def bucket(self) -> Bucket:
        """A new, empty bucket."""
        name = f"b-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return Bucket(name, self.endpoint, self.access_key, self.secret_key)


@contextlib.contextmanager
def mock_s3() -> Iterator[S3Server]:
    """An imitation of S3 in this process: quick, and its conditional writes are Amazon's."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield S3Server("http://{}:{}".format(*server.get_host_and_port()))
    finally:
        server.stop()


_CEPH_CONF = """\
[global]
fsid = {fsid}
mon_host = v1:127.0.0.1:{mon_port}
public_addr = 127.0.0.1
ms_bind_msgr2 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_crush_chooseleaf_type = 0
mon_max_pg_per_osd = 1000
osd_objectstore = memstore
memstore_device_bytes = 4294967296
run_dir = {folder}
admin_socket = {folder}/$name.asok
log_file = {folder}/$name.log
pid_file = {folder}/$name.pid
debug_ms = 0
[mon.a]
mon_data = {folder}/mon
mon_cluster_log_file = {folder}/cluster.log
mon_data_avail_crit = 1
mon_data_avail_warn = 1
[osd.0]
osd_data = {folder}/osd
[client.rgw]
rgw_data = {folder}/rgw
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_enable_usage_log = false
"""


@contextlib.contextmanager
def radosgw() -> Iterator[S3Server]:
    """Ceph's S3 gateway over one monitor and one storage daemon that keeps all in memory.

    Raises:
        ServerMissing: when a part of Ceph is not installed.
        ServerFailed: when it does not start.
    """
    for name in ("ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool"):
        program(name, name if name.startswith("ceph-") else "radosgw")
    with contextlib.ExitStack() as started:
        for left in reversed(range(_CEPH_TRIES)):
            folder = started.enter_context(_scratch("ceph"))
            try:
                made = _start_ceph(folder, started)
                break
            except ServerFailed as failure:
                _LOG.warning("Ceph did not start, %d more tries: %s", left, failure)
                started.close()
                if not left:
                    raise
        yield made


def _start_ceph(folder: Path, started: contextlib.ExitStack) -> S3Server:
    port, mon_port, fsid = free_port(), free_port(), str(uuid.uuid4())
    conf = folder / "ceph.conf"
    made = S3Server(f"http://127.0.0.1:{port}", ceph_conf=conf)
    conf.write_text(_CEPH_CONF.format(folder=folder, fsid=fsid, port=port, mon_port=mon_port))
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()

    def daemon(name: str, *command: str) -> subprocess.Popen[bytes]:
        process = start([*command, "-c", str(conf), "-f"], folder / f"{name}.out")
        started.callback(stop, process, 0.5)  # nothing of it is kept
        return process

    ceph = ["ceph", "-c", str(conf)]
    monmap, osd_id = str(folder / "monmap"), str(uuid.uuid4())
    address = f"[v1:127.0.0.1:{mon_port}]"
    _run(["monmaptool", "--create", "--addv", "a", address, "--fsid", fsid, monmap])
    _run(["ceph-mon", "-c", str(conf), "--mkfs", "-i", "a", "--monmap", monmap])
    daemon("mon", "ceph-mon", "-i", "a")
    # A monitor that has just begun answers some commands with a refusal.
    asked = lambda: subprocess.run([*ceph, "fsid"], capture_output=True).returncode == 0  # noqa: E731
    wait_until("ceph-mon", asked, _CEPH_SECONDS)
    _run([*ceph, "osd", "new", osd_id, "0"])
    _run(["ceph-osd", "-c", str(conf), "-i", "0", "--mkfs", "--osd-uuid", osd_id])
    daemon("osd", "ceph-osd", "-i", "0")
    _run([*ceph, "osd", "crush", "add", "osd.0", "1.0", "host=h", "root=default"])
    gateway = daemon("rgw", "radosgw", "-n", "client.rgw")
    ready = lambda: answers_http(made.endpoint)  # noqa: E731
    _wait_for(gateway, folder / "client.rgw.log", "radosgw", ready, _CEPH_SECONDS)
    keys = ["--access-key", made.access_key, "--secret-key", made.secret_key]
    _run(["radosgw-admin", "-c", str(conf), "user", "create", "--uid=t", "--display-name=t", *keys])
    return made
