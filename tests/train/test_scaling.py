"""The scaling model: what must hold of any constants, and that the stored ones are fitted ones with a source."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kindling.errors import ConfigError
from kindling.train import scaling
from kindling.train.scaling import Job, Network, estimate, exchange_s, period, sent_bytes, slowest

JOB = Job(weights=1_000_000, rows=64_000, batch_size=32, step_s=0.01)
LAN = Network(rate_bit_s=1e9, delay_s=1e-4)
EXACT: dict[str, Any] = {
    "network": {"start_s": 0.001, "peer_s": 0.0005, "delays": 2.0, "wire": 1.25, "crowd": 0.4, "copy_s_per_byte": 1e-9},
    "one_machine": {**dict.fromkeys(scaling.CONSTANTS, 0.0), "start_s": 0.0001, "copy_s_per_byte": 5e-10},
}


def test_an_exchange_is_the_formula() -> None:
    sent = 6_000_000  # 2 x 3 / 4 of four million bytes
    expected = 0.001 + 3 * 0.0005 + 2 * 1e-4 + (1.25 + 0.4 * 0.5) * sent * 8 / 1e9 + sent * 1e-9
    assert sent_bytes(4_000_000, 4) == sent
    assert exchange_s(4_000_000, 4, LAN, EXACT) == pytest.approx(expected, rel=1e-12)
    crowded = replace(LAN, workers_per_core=2.0)
    assert exchange_s(4_000_000, 4, crowded, EXACT) == pytest.approx(expected + sent * 1e-9, rel=1e-12)
    alone = replace(LAN, one_machine=True)
    assert exchange_s(4_000_000, 4, alone, EXACT) == pytest.approx(0.0001 + sent * 5e-10, rel=1e-12)
    assert exchange_s(4_000_000, 1, LAN, EXACT) == 0.0


def test_an_epoch_is_its_steps_and_its_exchanges() -> None:
    epoch = estimate(JOB, 4, LAN, every=16, fitted=EXACT)
    assert epoch.steps == 500
    assert epoch.compute_s == pytest.approx(5.0)
    assert epoch.exchange_s == pytest.approx(32 * exchange_s(4_000_000, 4, LAN, EXACT))  # the last at the epoch's end
    assert epoch.bytes_sent == 32 * 6_000_000
    assert epoch.epoch_s == epoch.compute_s + epoch.exchange_s
    assert epoch.exchanging == epoch.exchange_s / epoch.epoch_s
    half = estimate(JOB, 4, LAN, share=0.5, fitted=EXACT)
    assert half.bytes_sent == estimate(JOB, 4, LAN, fitted=EXACT).bytes_sent // 2
    assert estimate(JOB, 1, LAN, fitted=EXACT).epoch_s == pytest.approx(20.0)


@pytest.mark.parametrize("workers", [2, 8, 64, 512])
def test_the_period_leaves_the_time_it_promises_and_no_more(workers: int) -> None:
    every = period(JOB, workers, LAN, spent=0.2)
    exchange = exchange_s(4_000_000, workers, LAN)
    assert exchange / (every * JOB.step_s + exchange) <= 0.2 + 1e-9
    if every > 1:
        assert exchange / ((every - 1) * JOB.step_s + exchange) > 0.2


def test_rates_delays_sizes_and_workers_never_make_it_faster() -> None:
    at = exchange_s(4_000_000, 8, LAN)
    assert exchange_s(4_000_000, 8, replace(LAN, rate_bit_s=1e8)) > at
    assert exchange_s(4_000_000, 8, replace(LAN, delay_s=0.02)) >= at
    assert exchange_s(8_000_000, 8, LAN) > at
    assert exchange_s(4_000_000, 9, LAN) > at


def test_the_slowest_of_many_is_waited_for_unless_they_meet_rarely() -> None:
    uneven = replace(JOB, variation=0.3)
    assert slowest(0.3, 1) == 1.0
    assert estimate(uneven, 8, LAN).compute_s > 1.5 * estimate(JOB, 8, LAN).compute_s
    assert estimate(uneven, 8, LAN, every=100).compute_s < 1.1 * estimate(JOB, 8, LAN).compute_s


def test_the_stored_constants_are_fitted_and_say_from_what() -> None:
    known = scaling.constants()
    for kind in ("network", "one_machine"):
        assert all(value >= 0 for value in known[kind].values())
        assert known["fit"][kind]["points"] >= 8
    assert 0.7 <= known["network"]["wire"] <= 2  # a link carries its rate, and a burst of what it has saved up
    close, link = Network(rate_bit_s=1e10, one_machine=True), Network(rate_bit_s=1e10)
    assert exchange_s(16 << 20, 2, close) < exchange_s(16 << 20, 2, link)
    assert known["start_s"] > 0
    assert known["pack_bytes_s_per_worker"] > 0
    assert {run["case"] for run in known["provenance"]} == {"network", "lenet_epoch", "spool"}
    for run in known["provenance"]:
        assert run["command"].startswith("python benchmarks/run.py")
        assert run["machine"]["processor"]
        assert run["versions"]["torch"]


def test_what_describes_no_training_is_refused() -> None:
    with pytest.raises(ConfigError, match="step_s=0 describes no training"):
        replace(JOB, step_s=0)
    with pytest.raises(ConfigError, match="delay_s=-1 is no delay"):
        replace(LAN, delay_s=-1)
    with pytest.raises(ConfigError, match="workers=0 leaves nobody"):
        estimate(JOB, 0, LAN)
