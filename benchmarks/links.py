"""A network of one's own: worker namespaces joined by a bridge, over links of a chosen rate and delay.

Everything lives in namespaces whose names carry this process's number: nothing is added to the machine's own network,
and deleting the namespaces removes all of it. Rates are shaped by `tbf` in both directions of each link. Delay comes
from `programs/delay_relay.py`, for kernels without `netem`. Linux, root and iproute2 are needed; `missing` says which
of them is not there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import REPOSITORY, BenchmarkError

_PREFIX = "kindling-"
_QUEUE_S = 0.05
"""How long a packet may wait for its link before it is dropped."""
_BURST_S = 0.001
_LEAST_BURST_BYTES = 64 << 10
_SUBNET = "10.77.0"


@dataclass(frozen=True, kw_only=True)
class Link:
    """One worker's way to the others, the same in both directions.

    >>> Link(rate_bit_s=1e8).name, Link(rate_bit_s=1e9, delay_s=0.02).name
    ('100 Mbit/s', '1 Gbit/s, 20 ms')
    """

    rate_bit_s: float
    delay_s: float = 0.0
    """From one worker to another, one way."""
    relay: bool = False
    """Send through the relay even without delay: what the relay itself costs."""

    @property
    def name(self) -> str:
        rate = f"{self.rate_bit_s / 1e9:g} Gbit/s" if self.rate_bit_s >= 1e9 else f"{self.rate_bit_s / 1e6:g} Mbit/s"
        return rate + (f", {1000 * self.delay_s:g} ms" if self.delay_s else ", relayed" if self.relay else "")


@dataclass(frozen=True)
class Network:
    """A network that stands."""

    addresses: tuple[str, ...]
    """One per worker."""
    prefixes: tuple[tuple[str, ...], ...]
    """By worker, the words before a command that runs it there."""
    relay_pid: int | None = None

    def relay_cpu_s(self) -> float:
        """Processor seconds that the relay has used so far; 0 without one."""
        if self.relay_pid is None:
            return 0.0
        words = Path(f"/proc/{self.relay_pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def missing() -> str | None:
    """Why no network can be made here, with the way on; None where one can."""
    if sys.platform != "linux":
        return "network namespaces exist on Linux only."
    if os.geteuid() != 0:
        return (
            "making network namespaces needs root. Run this case as root: sudo .venv/bin/python benchmarks/run.py ..."
        )
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"the command {tool!r} is missing. Install iproute2: apt-get install iproute2"
    probe = f"{_PREFIX}{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespace can be made here: {made.stderr.strip()}. A container needs --privileged for it."
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return None


@contextlib.contextmanager
def network(workers: int, link: Link) -> Iterator[Network]:
    """A network of so many workers, gone afterwards, with what an earlier process left behind.

    Raises: BenchmarkError, where it cannot be made.
    """
    why = missing()
    if why is not None:
        raise BenchmarkError(why)
    _sweep()
    mine = f"{_PREFIX}{os.getpid()}"
    hub, names = f"{mine}-hub", [f"{mine}-{worker}" for worker in range(workers)]
    relay: subprocess.Popen[str] | None = None
    try:
        for name in (hub, *names):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", hub, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge0", "up")
        if link.relay or link.delay_s:
            relay = _start_relay(hub, names, link.delay_s / 2)
        else:
            for worker, name in enumerate(names):
                _ip("-n", hub, "link", "add", f"port{worker}", "type", "veth", "peer", "name", "eth0", "netns", name)
        for worker, name in enumerate(names):
            _ip("-n", hub, "link", "set", f"port{worker}", "master", "bridge0")
            _ip("-n", name, "address", "add", f"{_SUBNET}.{worker + 1}/24", "dev", "eth0")
            for space, device in ((hub, f"port{worker}"), (name, "eth0")):
                _ip("-n", space, "link", "set", device, "up")
                _shape(space, device, link.rate_bit_s)
        yield Network(
            tuple(f"{_SUBNET}.{worker + 1}" for worker in range(workers)),
            tuple(("ip", "netns", "exec", name) for name in names),
            relay.pid if relay else None,
        )
    finally:
        if relay is not None:
            relay.kill()
            relay.wait()
        for name in (hub, *names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _shape(space: str, device: str, rate_bit_s: float) -> None:
    burst = max(_LEAST_BURST_BYTES, int(rate_bit_s / 8 * _BURST_S))
    limit = burst + int(rate_bit_s / 8 * _QUEUE_S)
    words = ("root", "tbf", "rate", f"{int(rate_bit_s)}bit", "burst", str(burst), "limit", str(limit))
    _run("tc", "-n", space, "qdisc", "add", "dev", device, *words)


def _start_relay(hub: str, names: Sequence[str], delay_s: float) -> subprocess.Popen[str]:
    """Start the relay, which makes both ends of every link: `portN` in the hub, `eth0` in the worker's namespace."""
    relay = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.programs.delay_relay"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert relay.stdin is not None
    assert relay.stdout is not None
    relay.stdin.write(json.dumps({"hub": hub, "names": list(names), "delay_s": delay_s}) + "\n")
    relay.stdin.flush()  # and stays open: the relay ends when this process does
    if relay.stdout.readline().strip() != "ready":
        relay.kill()
        relay.wait()
        raise BenchmarkError("the delay relay could not be started: is /dev/net/tun there?")
    return relay


def _sweep() -> None:
    """Delete namespaces of processes that are gone."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0] if line.split() else ""
        pid = name.removeprefix(_PREFIX).partition("-")[0]
        if name.startswith(_PREFIX) and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(words)} failed: {done.stderr.strip()}")
    return done.stdout
