"""Sums through shared memory: real processes, a real gloo group, against numpy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memfd is Linux's")

PRELUDE = """
import os, sys
import numpy as np, torch, torch.distributed as dist
from kindling.train.strategies import GroupComms, SharedMemoryComms, shared_memory
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
store = dist.FileStore(folder + "/store", world)
dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=world)
"""


def start(folder: Path, world: int, body: str) -> list[subprocess.Popen[str]]:
    """`body` in as many processes of one group."""
    code = PRELUDE + textwrap.dedent(body)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(world), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]


def said(processes: list[subprocess.Popen[str]]) -> list[str]:
    answers = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, answers, strict=True):
        assert process.returncode == 0, errors
    return [out.strip() for out, _ in answers]


@pytest.mark.parametrize("world", [2, 3])
def test_sums_of_every_kind(tmp_path: Path, world: int) -> None:
    """Several dtypes, odd sizes, more than a slot holds, pieces of memory with gaps, scales, no number at scale 0."""
    body = """
    shared_memory._SLOT_BYTES = 1 << 16
    comms = SharedMemoryComms.open(store)
    assert comms is not None
    rng = np.random.default_rng(rank)
    for turn in range(3):
        tensors = [
            torch.from_numpy(rng.standard_normal(shape).astype(kind))
            for shape, kind in (((3, 5), "f4"), ((50_001,), "f4"), ((7,), "f8"), ((0,), "f4"), ((40, 30), "f4"))
        ]
        tensors.append(torch.from_numpy(rng.standard_normal((60, 70)).astype("f4")).t())
        scale = [0.25, 0.5, 0.0][rank]
        if scale == 0:
            tensors[1].fill_(float("nan"))
        before = [t.clone() for t in tensors]
        comms.sum_all(tensors, scale)
        arrays = {f"in{i}": t.numpy() for i, t in enumerate(before)}
        arrays |= {f"out{i}": t.numpy() for i, t in enumerate(tensors)}
        np.savez(f"{folder}/{turn}-{rank}.npz", scale=scale, **arrays)
    counts = torch.arange(100_000) + rank
    comms.all_reduce(counts)
    assert torch.equal(counts, world * torch.arange(100_000) + world * (world - 1) // 2)
    assert [v.tolist() for v in comms.gather(np.arange(rank + 1))] == [list(range(n + 1)) for n in range(world)]
    dist.destroy_process_group()
    """
    said(start(tmp_path, world, body))
    for turn in range(3):
        seen = [np.load(tmp_path / f"{turn}-{rank}.npz") for rank in range(world)]
        for number in range(6):
            # In the order of the ranks, each product and each sum rounded: the very bits.
            total = None
            for one in seen:
                value = one[f"in{number}"]
                part = np.zeros_like(value) if one["scale"] == 0 else value * value.dtype.type(one["scale"])
                total = part if total is None else total + part
            for one in seen:
                np.testing.assert_array_equal(one[f"out{number}"], total)


def test_the_bits_do_not_depend_on_the_hosts(tmp_path: Path) -> None:
    """Workers of one host and workers of three: the same sums, in the order of the ranks."""
    body = """
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(100_003, generator=generator)
    shared, group = values.clone(), values.clone()
    SharedMemoryComms.open(store).all_reduce(shared)
    GroupComms().all_reduce(group)
    total = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    for other in range(1, world):
        total += torch.randn(100_003, generator=torch.Generator().manual_seed(other))
    print(torch.equal(shared, group), torch.equal(group, total))
    dist.destroy_process_group()
    """
    assert said(start(tmp_path, 3, body)) == ["True True"] * 3


def test_bytes_are_counted_as_the_group_counts_them(tmp_path: Path) -> None:
    body = """
    shared, plain = SharedMemoryComms.open(store), GroupComms()
    for comms in (shared, plain):
        comms.sum_all([torch.ones(1000), torch.ones(77, dtype=torch.float64)])
        comms.all_reduce(torch.ones(50_000))
    print(shared.bytes_sent, plain.bytes_sent)
    dist.destroy_process_group()
    """
    for line in said(start(tmp_path, 2, body)):
        assert line == f"{2 * (4000 + 616 + 200_000) // 2} {2 * (4000 + 616 + 200_000) // 2}"


def test_where_one_cannot_reach_the_memory_all_do_without(tmp_path: Path) -> None:
    body = """
    if rank == 1:
        def foreign(store):
            raise OSError("another container")
        shared_memory._foreign_board = foreign
    print(SharedMemoryComms.open(store))
    dist.destroy_process_group()
    """
    assert said(start(tmp_path, 3, body)) == ["None"] * 3


def test_an_address_that_leads_elsewhere_is_not_used(tmp_path: Path) -> None:
    """The same process number in another container: some other file is there."""
    body = """
    if rank == 0:
        real = shared_memory._new_board
        def lying(size, store):
            opened = real(size, store)
            pid, number, _ = store.get("board").decode().split("/")
            store.set("board", f"{pid}/{number}/{'0' * 16}")
            dist.barrier()
            return opened
        shared_memory._new_board = lying
    else:
        dist.barrier()
    print(SharedMemoryComms.open(store))
    dist.destroy_process_group()
    """
    assert said(start(tmp_path, 2, body)) == ["None"] * 2


def named_memory() -> set[str]:
    """Shared memory with a name that kindling or torch could have given it; other programs have their own."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("kindling", "torch"))}


def test_a_worker_that_dies_stops_the_others_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    body = """
    comms = SharedMemoryComms.open(store)
    block = torch.ones(1 << 20)
    print("going", flush=True)
    while True:
        comms.sum_all([block], 0.5)
    """
    before = named_memory()
    processes = start(tmp_path, 2, body)
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "going"
        processes[1].send_signal(signal.SIGKILL)
        began = time.monotonic()
        _, errors = processes[0].communicate(timeout=60)
        assert time.monotonic() - began < 30
        assert processes[0].returncode != 0
        assert "RuntimeError" in errors
        processes[1].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert named_memory() <= before
