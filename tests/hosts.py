"""Several hosts on one machine, for tests: each has a network card, a name, processes and a disk of its own.

A host is a set of Linux namespaces. Its files are a read-only view of what programs need, its own /tmp and /dev/shm,
and its home, a folder that no other host has. The hosts' cables meet in a switch, which is a namespace too: nothing
shows in the network of the machine. Whatever happens, nothing outlives the process that made it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

HOME = "/home/user"
TOOLS = ("hostname", "ip", "mount", "nsenter", "pgrep", "pivot_root", "setpriv", "unshare")
READ_ONLY = ("/bin", "/etc", "/lib", "/lib64", "/opt", "/sbin", "/usr")
"""What programs need of the machine; Python's own places and this project's come to it."""

BOOT = f"""
set -e
root=$1 disk=$2 name=$3 address=$4; shift 4
mount --make-rprivate /
mount -t tmpfs tmpfs "$root"
for path in "$@"; do
  if [ -L "$path" ]; then cp -a "$path" "$root$path"; continue; fi
  mkdir -p "$root$path"
  mount --bind "$path" "$root$path"
  mount -o remount,bind,ro "$root$path"
done
cd "$root"
mkdir -p proc dev sys tmp run old .{HOME}
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs tmpfs dev/shm
mount --bind "$disk" .{HOME}
printf '127.0.0.1 localhost\\n%s %s\\n' "$address" "$name" > run/hosts
mount --bind run/hosts etc/hosts
pivot_root . old
umount -l /old
hostname "$name"
echo booted
while :; do sleep 1000 & wait; done
"""
"""The first process of a host. Its last line is there to reap those whose parents ended."""


def unavailable() -> str | None:
    """Why there can be no hosts here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts of namespaces need root on Linux"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"hosts of namespaces need {', '.join(missing)}"
    tried = subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Host:
    """One of a `Network`. `disk` is its home, seen from outside; what is there outlives a loss of power."""

    def __init__(self, name: str, address: str, folder: Path, card: subprocess.Popen[str]) -> None:
        self.name, self.address = name, address
        self.disk, self._root = folder / name, folder / f"{name}.root"
        self.disk.mkdir()
        self._root.mkdir()
        self._card = card
        self._boot: subprocess.Popen[str] | None = None

    def power_on(self) -> None:
        assert self._boot is None
        places = dict.fromkeys([*READ_ONLY, sys.prefix, sys.base_prefix, str(Path(__file__).parents[1])])
        existing = [place for place in places if Path(place).exists()]
        apart = ("--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child")
        script = ("sh", "-c", BOOT, "boot", str(self._root), str(self.disk), self.name, self.address, *existing)
        self._boot = boot = _bound_to_us(*_in_network_of(self._card), "unshare", *apart, *script)
        assert boot.stdout is not None
        if (said := boot.stdout.readline()) != "booted\n":
            raise RuntimeError(f"{self.name} does not boot: {said}")
        (first,) = Path(f"/proc/{boot.pid}/task/{boot.pid}/children").read_text().split()
        self._first_process = int(first)

    def power_off(self) -> None:
        """All processes end at one moment; whoever has a connection to one is told by the network."""
        if self._boot is not None:
            os.kill(self._first_process, signal.SIGKILL)  # and with it everything in its namespace
            self._boot.communicate()
            self._boot = None

    def command(self, *arguments: str) -> list[str]:
        """What runs a command on this host, in its home."""
        inside = ("--mount", "--uts", "--ipc", "--net", "--pid", "--root")
        home = f"--wd=/proc/{self._first_process}/root{HOME}"
        return ["nsenter", f"--target={self._first_process}", *inside, home, "--", *arguments]

    def run(self, *arguments: str, env: Mapping[str, str], timeout: float = 180) -> subprocess.CompletedProcess[str]:
        """A command on this host, to its end."""
        return subprocess.run(self.command(*arguments), env=env, capture_output=True, text=True, timeout=timeout)


class Network:
    """Hosts that reach each other and nothing else."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._switch = _network_namespace()
        self._cards: dict[str, subprocess.Popen[str]] = {}
        self.hosts: list[Host] = []
        self._ip("link add switch type bridge")
        self._ip("link set switch up")

    def host(self, name: str) -> Host:
        """A new one, switched on. It has a port of its name at the switch."""
        address, card = f"10.77.0.{len(self.hosts) + 1}", _network_namespace()
        self._cards[name] = card
        self._ip(f"link add {name} type veth peer name eth0 netns {card.pid}")
        self._ip(f"link set {name} master switch up")
        for line in (f"address add {address}/24 dev eth0", "link set lo up", "link set eth0 up"):
            _ip(line, card)
        self.hosts.append(Host(name, address, self._folder, card))
        self.hosts[-1].power_on()
        return self.hosts[-1]

    def pull_the_cable(self, host: Host) -> None:
        """From now on nothing comes from it or to it, and nobody is told."""
        self._ip(f"link set {host.name} down")

    def plug_in(self, host: Host) -> None:
        self._ip(f"link set {host.name} up")

    def close(self) -> None:
        for host in self.hosts:
            host.power_off()
        for holder in (self._switch, *self._cards.values()):
            holder.kill()
            holder.communicate()

    def _ip(self, arguments: str) -> None:
        _ip(arguments, self._switch)


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    """For the length of a block. The hosts' disks are in the folder."""
    made = Network(folder)
    try:
        yield made
    finally:
        made.close()


def _network_namespace() -> subprocess.Popen[str]:
    """A process that keeps a new one."""
    holder = _bound_to_us("unshare", "--net", "sh", "-c", "echo here; exec sleep infinity")
    assert holder.stdout is not None
    if (said := holder.stdout.readline()) != "here\n":
        raise RuntimeError(f"no network namespace: {said}")
    return holder


def _bound_to_us(*command: str) -> subprocess.Popen[str]:
    """A process that ends with this one, however that ends."""
    return subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _in_network_of(holder: subprocess.Popen[str]) -> tuple[str, ...]:
    return ("nsenter", f"--net=/proc/{holder.pid}/ns/net")


def _ip(arguments: str, holder: subprocess.Popen[str]) -> None:
    subprocess.run([*_in_network_of(holder), "ip", *arguments.split()], check=True)
