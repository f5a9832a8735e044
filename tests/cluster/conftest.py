"""Hosts for a cluster on one machine: each with its own addresses, processes, home and /tmp, and SSH between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
NETWORK, OPERATOR = "10.177.0", 254
PROGRAMS = ("unshare", "nsenter", "setpriv", "ip", "ss", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd")
NAMESPACES = ("--mount", "--uts", "--net", "--pid")
# The first process of a host. Nothing outside sees what it mounts, and with it all processes of the host end.
INIT = """
set -e
hostname "$1"
ip link set lo up
mount --bind "$2/tmp" "$3"
mount -t tmpfs -o size=4g tmpfs /dev/shm
mount -t tmpfs tmpfs /run && mkdir /run/sshd
for name in passwd hosts resolv.conf; do mount --bind "$2/$name" "$(realpath /etc/$name)"; done
/usr/sbin/sshd -D -e -f "$2/sshd_config" 2> "$2/sshd.log" &
touch "$2/ready"
wait
"""


def missing() -> str:
    """What this machine lacks for such hosts; empty where it has all."""
    lacks = [program for program in PROGRAMS if shutil.which(program) is None]
    if lacks:
        return f"{', '.join(lacks)} not installed (Debian: openssh-server iproute2 rsync util-linux)"
    if os.geteuid() != 0:
        return "not root, which making hosts from namespaces takes"
    made = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "--mount-proc", "sh", "-c", "ip link add bridge0 type bridge"],
        capture_output=True,
        text=True,
    )
    return f"namespaces are not permitted: {made.stderr.strip()}" if made.returncode else ""


@dataclass(frozen=True)
class Host:
    """One host: a first process, and a folder with what is its own."""

    name: str
    address: str
    folder: Path
    pid: int

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def run(self, command: str, timeout_s: float = 300, check: bool = True) -> str:
        """What a command in a shell of this host prints, errors included."""
        done = subprocess.run(
            ["nsenter", "--target", str(self.pid), *NAMESPACES, "--wd=" + str(REPOSITORY),
             "env", "-i", f"HOME={self.home}", f"PATH={sys.prefix}/bin:{os.environ['PATH']}", "LANG=C.UTF-8",
             "RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0", "bash", "-c", command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{self.name}: {command}\n{done.stdout}"
        return done.stdout


@dataclass(frozen=True)
class Hosts:
    """An operator's machine, a head and workers on one network."""

    operator: Host
    head: Host
    workers: tuple[Host, ...]
    shared: Path
    key: Path

    def unplug(self, host: Host) -> None:
        """Take a host off the network, without a word to anybody."""
        _ip(self.operator.pid, f"link set to-{host.name} down")

    def plug_in(self, host: Host) -> None:
        _ip(self.operator.pid, f"link set to-{host.name} up")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """A head and two workers that the operator reaches by SSH; gone with everything in them at the end."""
    lacking = missing()
    if lacking:
        pytest.skip(lacking)
    root = Path(tempfile.mkdtemp(prefix="cedm-ray-hosts-", dir="/var/tmp"))  # outside /tmp, which each host has its own
    key, shared = root / "key", root / "shared"
    shared.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    started: list[subprocess.Popen[bytes]] = []
    try:
        operator = _start(root, "operator", OPERATOR, started, inside=None)
        _ip(
            operator.pid,
            "link add bridge0 type bridge",
            f"addr add {NETWORK}.{OPERATOR}/24 dev bridge0",
            "link set bridge0 up",
        )
        head, *workers = [
            _start(root, name, number, started, inside=operator)
            for number, name in enumerate(("head", "worker-1", "worker-2"), start=1)
        ]  # fmt: skip
        yield Hosts(operator, head, tuple(workers), shared, key)
    finally:
        for process in reversed(started):
            process.kill()  # unshare takes the first process with it, and that everything in its namespaces
            process.wait()
        shutil.rmtree(root, ignore_errors=True)


def _start(root: Path, name: str, number: int, started: list[subprocess.Popen[bytes]], inside: Host | None) -> Host:
    folder = root / name
    _furnish(folder, name, root / "key")
    enter = [] if inside is None else ["nsenter", "--target", str(inside.pid), "--pid"]
    # Also when pytest is killed no host is left.
    command = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        *enter,
        "unshare",
        *NAMESPACES,
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]
    process = subprocess.Popen([*command, "bash", "-c", INIT, name, name, str(folder), _private_tmp()])
    started.append(process)
    deadline_s = time.monotonic() + 20
    while not (folder / "ready").exists():
        assert process.poll() is None and time.monotonic() < deadline_s, f"host {name} does not start"
        time.sleep(0.1)
    host = Host(name, f"{NETWORK}.{number}", folder, _first_process(process.pid))
    if inside is not None:
        _ip(inside.pid, f"link add to-{name} type veth peer name eth0 netns {host.pid}")
        _ip(inside.pid, f"link set to-{name} master bridge0 up")
        _ip(host.pid, f"addr add {host.address}/24 dev eth0", "link set eth0 up")
        _ip(host.pid, f"route add default via {inside.address}")  # Ray finds a node's address by its way to the world
    return host


def _furnish(folder: Path, name: str, key: Path) -> None:
    """The files of a host that are not those of the machine; the environment counts as installed already."""
    environment = folder / "home" / "cedm_ray" / ".venv"
    environment.mkdir(parents=True)
    (folder / "tmp").mkdir(mode=0o1777)
    for part in ("bin", "lib", "pyvenv.cfg"):
        (environment / part).symlink_to(Path(sys.prefix) / part)
    installed = [(REPOSITORY / file).read_text() for file in ("pyproject.toml", "constraints.txt")]
    (environment / "installed").write_text("".join(installed))
    passwd = Path("/etc/passwd").read_text().replace(":/root:", f":{folder / 'home'}:", 1)
    (folder / "passwd").write_text(passwd)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
    (folder / "resolv.conf").write_text("")
    (folder / "home" / ".bashrc").write_text("")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host_key"], check=True)
    (folder / "sshd_config").write_text(
        f"HostKey {folder / 'host_key'}\nAuthorizedKeysFile {key}.pub\nStrictModes no\nUsePAM no\nPidFile none\n"
        "PasswordAuthentication no\nPermitRootLogin prohibit-password\nMaxStartups 100\nMaxSessions 100\n"
    )


def _private_tmp() -> str:
    """What of /tmp a host has for itself: all of it, unless what is tested lies there."""
    inside = [path for path in (REPOSITORY, Path(sys.prefix), Path(sys.base_prefix)) if path.is_relative_to("/tmp")]
    if inside:
        Path("/tmp/ray").mkdir(exist_ok=True)
    return "/tmp/ray" if inside else "/tmp"


def _first_process(unshare: int) -> int:
    """The process that becomes number 1 of a host; nsenter stands before unshare in the line of its parents."""
    pid = unshare
    while not _is_first(pid):
        (pid,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return pid


def _is_first(pid: int) -> bool:
    """Whether the process has number 1 in its own namespace."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("NSpid"))
    return line.split()[-1] == "1"


def _ip(pid: int, *commands: str) -> None:
    for command in commands:
        subprocess.run(["nsenter", "--target", str(pid), "--net", "ip", *command.split()], check=True)
