"""Thread settings: what stands in the environment, before and after torch is there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from kindling.errors import ConfigError
from kindling.threads import environment, settle


@pytest.fixture
def own_threads() -> Iterator[None]:
    variables, threads = dict(os.environ), torch.get_num_threads()
    yield
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("own_threads")
def test_settling_resizes_a_torch_that_is_loaded() -> None:
    for n in (1, 3, 3, 2):
        settle(n)
        assert torch.get_num_threads() == n
        assert os.environ["OMP_NUM_THREADS"] == str(n)
        assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_settling_first_decides_for_a_torch_that_comes_later() -> None:
    program = (
        "import sys, kindling.threads\n"
        "kindling.threads.settle(1)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "import torch\n"
        "print(torch.get_num_threads())"
    )
    clean = {k: v for k, v in os.environ.items() if k not in environment()}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=clean, check=True)
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize("n", [0, -1])
def test_no_thread_is_refused(n: int) -> None:
    before = dict(os.environ)
    with pytest.raises(ConfigError, match="leaves nobody to compute"):
        settle(n)
    assert dict(os.environ) == before
