"""Bare torch: how many pictures a second a net's forward pass takes, with nothing around it. The ceiling.

The runner starts one process with two threads, or two processes with one thread each. Every configuration is timed for
at least `seconds`, after one unmeasured batch.
"""

from __future__ import annotations

import time

from benchmarks.programs import answer, spec, wait_for_go


def main() -> None:
    """Spec: net, until, ceil_mode, size, dtype, channels_last, batch, threads, seconds. Answers images, times."""
    asked = spec()
    import torch

    from benchmarks.programs.torch_nets import build

    torch.set_num_threads(asked["threads"])
    layout = torch.channels_last if asked["channels_last"] else torch.contiguous_format
    dtype = getattr(torch, asked["dtype"])
    torch.manual_seed(0)
    module = build(asked["net"], until=asked["until"], ceil_mode=asked["ceil_mode"]).to(
        dtype=dtype, memory_format=layout
    )
    images = torch.randn(asked["batch"], 3, *asked["size"]).to(dtype=dtype, memory_format=layout)
    with torch.inference_mode():
        module(images)
        wait_for_go()
        began, done = time.time(), 0
        while time.time() - began < asked["seconds"] or done == 0:
            module(images)
            done += len(images)
        ended = time.time()
    answer({"images": done, "began": began, "ended": ended})


if __name__ == "__main__":
    main()
