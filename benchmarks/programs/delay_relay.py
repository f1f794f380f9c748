"""A cable with delay: carries Ethernet frames between pairs of tap devices, each frame so many seconds late.

For kernels without `netem`. Frames of up to 64 KiB pass whole, with the kernel's own header of what is still to be
segmented and summed, so a frame costs one read and one write whatever the rate. Ends when its standard input closes.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

from benchmarks.programs import spec

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8  # linux/if_tun.h
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 0x01, 0x02, 0x04
_VNET_HEADER_BYTES = 10
_FRAME_BYTES = _VNET_HEADER_BYTES + 18 + 65536
_AT_ONCE = 32
"""Frames read from one device before the others get their turn."""


def tap(namespace: str, name: str) -> int:
    """A new tap device in a network namespace; the descriptor its frames are read from and written to."""
    libc = ctypes.CDLL(None, use_errno=True)
    space = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(space, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")
    finally:
        os.close(space)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(device, _TUNSETVNETHDRSZ, struct.pack("i", _VNET_HEADER_BYTES))
    fcntl.ioctl(device, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6)
    return device


def carry(pairs: list[tuple[int, int]], delay_s: float) -> None:
    """Move frames between the devices of each pair until standard input closes."""
    other = {near: far for pair in pairs for near, far in (pair, pair[::-1])}
    late: dict[int, deque[tuple[float, bytes]]] = {device: deque() for device in other}
    watched = [sys.stdin.fileno(), *other]
    while True:
        first = min((queue[0][0] for queue in late.values() if queue), default=None)
        wait = None if first is None else max(0.0, first - time.monotonic())
        ready, _, _ = select.select(watched, [], [], wait)
        for device in ready:
            if device == watched[0]:
                return
            queue = late[other[device]]
            for _ in range(_AT_ONCE):
                try:
                    frame = os.read(device, _FRAME_BYTES)
                except (BlockingIOError, OSError):
                    break
                queue.append((time.monotonic() + delay_s, frame))
        for device, queue in late.items():
            while queue and queue[0][0] <= time.monotonic():
                try:
                    os.write(device, queue.popleft()[1])
                except OSError:
                    continue  # the device is down or full: the frame is lost, as on any network


def main() -> None:
    """Spec: hub, names, delay_s (of one link). Makes `portN` in the hub and `eth0` in each named namespace."""
    asked = spec()
    pairs = [(tap(asked["hub"], f"port{n}"), tap(name, "eth0")) for n, name in enumerate(asked["names"])]
    print("ready", flush=True)
    carry(pairs, asked["delay_s"])


if __name__ == "__main__":
    main()
