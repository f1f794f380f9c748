"""Thread counts of a Python worker: one task, few threads, none of them spinning.

Only settings, no work: called first by every function that runs on Spark workers (`predict/batch.py`,
`train/worker.py`), before torch is imported there, because OpenMP reads its environment once, when it is loaded.
"""

from __future__ import annotations

import os
import sys

from kindling.errors import ConfigError

_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")


def environment(n: int = 1) -> dict[str, str]:
    """The environment variables that give a process `n` threads per pool, asleep while they wait.

    >>> environment(2)["OMP_NUM_THREADS"], environment()["OMP_WAIT_POLICY"]
    ('2', 'PASSIVE')
    """
    if n < 1:
        raise ConfigError("threads", n, "leaves nobody to compute", "Use 1 or more")
    # KMP_BLOCKTIME says to Intel's and LLVM's OpenMP what OMP_WAIT_POLICY says to GNU's.
    return {**dict.fromkeys(_COUNTS, str(n)), "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}


def settle(n: int = 1) -> None:
    """Give this process `n` computing threads, whether or not torch is loaded already.

    Idempotent, and safe in a Python worker that Spark uses again for another task with another `n`: where torch is
    loaded its pools are resized, where it is not the environment stands before it comes. Never imports torch.

    Raises: ConfigError, when `n` is below 1.

    >>> import os
    >>> before = dict(os.environ)
    >>> settle(1)
    >>> os.environ["OMP_NUM_THREADS"]
    '1'
    >>> os.environ.clear(); os.environ.update(before)
    """
    os.environ.update(environment(n))
    torch = sys.modules.get("torch")
    # A half-imported torch (another thread is importing it) reads the environment itself.
    if torch is not None and hasattr(torch, "set_num_threads") and torch.get_num_threads() != n:
        torch.set_num_threads(n)
