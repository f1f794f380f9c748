"""Every strategy over a real gloo group in real processes, and all-reduce against DistributedDataParallel."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from strategy_cases import CASES, REPEATABLE, Case, net, train, uneven, weights

from kindling.train.strategies import Comms, InProcessComms

PRELUDE = """
import copy, os, sys
import numpy as np, torch, torch.distributed as dist
from torch import nn
sys.path.insert(0, sys.argv[4])
from cases import CASES, backward, net, rows, sgd, step_of, train, uneven, weights
from kindling.train.strategies import AllReduce, GroupComms, Replica, SharedMemoryComms
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
store = dist.FileStore(folder + "/store", world)
dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=world)
"""


def run(folder: Path, world: int, body: str) -> None:
    """`body` in as many processes of one group; they leave what they found in the folder."""
    code = PRELUDE + textwrap.dedent(body) + "\ndist.destroy_process_group()\n"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder), str(Path(__file__).parent)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=150)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()


def as_threads(case: Case, comms: Comms) -> tuple[torch.Tensor, int]:
    trained = train(case.make(), comms, [uneven(comms.world, 7)], net())
    return weights(trained.module), comms.bytes_sent


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_group_computes_what_threads_compute(tmp_path: Path, world: int) -> None:
    """Bit for bit, over sockets and through shared memory; what is not repeatable agrees in the end."""
    body = """
    shared = SharedMemoryComms.open(store)
    for name, case in CASES.items():
        for kind, comms in (("group", GroupComms()), ("shared", shared)):
            if comms is None:
                continue
            sent = comms.bytes_sent
            trained = train(case.make(), comms, [uneven(world, 7)], net())
            np.savez(f"{folder}/{kind} {name} {rank}", weights(trained.module).numpy(), comms.bytes_sent - sent)
            if kind == "group":
                comms.close()
    """
    run(tmp_path, world, body)
    for name, case in CASES.items():
        paths = [tmp_path / f"{kind} {name} {rank}.npz" for kind in ("group", "shared") for rank in range(world)]
        found = [np.load(path) for path in paths if path.exists() or path.name.startswith("group")]
        assert len(found) in (world, 2 * world)
        if name in REPEATABLE:
            (expected, sent), *_ = InProcessComms.run(world, partial(as_threads, case))
            for one in found:
                assert torch.equal(torch.from_numpy(one["arr_0"]), expected), name
            if case.sends:
                assert {int(one["arr_1"]) for one in found} == {sent}
        for one in found:
            again = [other for other in found if np.array_equal(other["arr_0"], one["arr_0"])]
            assert len(again) >= world, name
            assert np.isfinite(one["arr_0"]).all()


def test_all_reduce_is_distributed_data_parallel_to_the_bit(tmp_path: Path) -> None:
    """Two workers with as many rows each; whole gradients, and torch's own hook that sends bfloat16."""
    body = """
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
    from torch.nn.parallel import DistributedDataParallel

    def in_half(state, bucket):  # by another name: under its own torch lets it go over nccl only
        return bf16_compress_hook(state, bucket)

    batches = [[rows(6, 10 * step + r) for r in range(world)] for step in range(6)]
    for name, hook in ((None, None), ("bf16", in_half)):
        theirs = DistributedDataParallel(net())
        if hook is not None:
            theirs.register_comm_hook(None, hook)
        optimizer = sgd(theirs)
        for step in batches:
            optimizer.zero_grad()
            backward(theirs, step[rank])
            optimizer.step()
        ours = train(AllReduce(compression=name), GroupComms(), [batches], net())
        np.savez(f"{folder}/{name} {rank}", weights(ours.module).numpy(), weights(theirs.module).numpy())
    """
    run(tmp_path, 2, body)
    paths = sorted(tmp_path.glob("*.npz"))
    assert len(paths) == 4
    for path in paths:
        found = np.load(path)
        np.testing.assert_array_equal(found["arr_0"], found["arr_1"])
        assert not np.array_equal(found["arr_0"], weights(net()).numpy())
