"""`kindling.advise`: the choice among options, what is measured, and the page it prints."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import kindling as kd
from kindling.advice import Option, choose, measure_step, strategies, trainable
from kindling.errors import ConfigError, DataError
from kindling.train.preflight import default_optimizer
from kindling.train.scaling import Job, Network

ONE = Option(name="one machine", workers=1, threads=8, epoch_s=100.0, all_s=1010.0, exchanging=0.0, bytes_sent=0)
MANY = Option(name="8 x AllReduce()", workers=8, threads=1, epoch_s=20.0, all_s=210.0, exchanging=0.1, bytes_sent=9)


def test_all_reduce_is_taken_where_its_talking_is_worth_it() -> None:
    pick, why = choose([ONE, MANY, replace(MANY, name="averaging", epoch_s=18.0, exchanging=0.02)])
    assert pick.name == "8 x AllReduce()"
    assert "5.0 times as fast as one machine with 8 threads" in why


def test_the_first_that_talks_little_enough_else_the_fastest() -> None:
    loud = replace(MANY, exchanging=0.7, epoch_s=60.0)
    quiet = replace(MANY, name="8 x ParameterAveraging(every=9)", exchanging=0.2, epoch_s=22.0)
    pick, why = choose([ONE, loud, replace(loud, name="bf16", exchanging=0.5, epoch_s=35.0), quiet])
    assert pick is quiet
    assert "8 x AllReduce() would spend 70 %" in why
    assert choose([ONE, loud, replace(loud, name="bf16", epoch_s=35.0)])[0].name == "bf16"


def test_one_machine_is_advised_where_it_is_faster() -> None:
    pick, why = choose([replace(ONE, epoch_s=15.0), MANY])
    assert pick.workers == 1
    assert "One machine would be faster" in why
    assert "workers=1, threads=8" in why


def test_a_gain_that_the_start_eats_is_called_small() -> None:
    short = [replace(ONE, epoch_s=2.0, all_s=32.0), replace(MANY, epoch_s=1.0, all_s=31.0)]
    assert "little difference" in choose(short)[1]


def test_strategies_talk_less_the_slower_the_network_is() -> None:
    job = Job(weights=1_000_000, rows=10**9, batch_size=32, step_s=0.01)
    fast, slow = (dict(strategies(job, 8, Network(rate_bit_s=rate))) for rate in (1e11, 1e7))
    (rare,) = (name for name in slow if "every=" in name)
    assert "DiLoCo" in rare
    every = int(re.search(r"every=(\d+)", rare)[1])  # type: ignore[index]
    assert every > max([1, *(found.every for found in fast.values())])
    assert slow[rare].exchanging <= 0.2 + 1e-3
    assert slow["8 x AllReduce()"].exchanging > slow['8 x AllReduce(compression="bf16")'].exchanging
    (once,) = (name for name, _ in strategies(replace(job, rows=2560), 8, Network(rate_bit_s=1e7)) if "every=" in name)
    assert once.endswith("every=10)")  # an epoch's end is the last chance to agree
    assert strategies(job, 1, Network(rate_bit_s=1e7)) == []


def test_measuring_leaves_the_model_and_the_random_state_alone() -> None:
    torch.manual_seed(3)
    model = kd.Model.of(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)), shape=(4,), labels=["a", "b"])
    before = [p.detach().clone() for p in model.module.parameters()]
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    seconds, variation = measure_step(
        model.module,
        model.signature,
        model.preparation,
        frozen=frozenset(),
        make_optimizer=default_optimizer,
        loss=nn.CrossEntropyLoss(),
        batch_size=16,
        threads=1,
    )
    assert seconds > 0
    assert variation >= 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(old, new) for old, new in zip(before, model.module.parameters(), strict=True))
    assert trainable(model.module, frozenset()) == 4 * 8 + 8 + 8 * 2 + 2
    assert trainable(model.module, frozenset({"0"})) == 8 * 2 + 2


@pytest.mark.spark
@pytest.mark.sessions
def test_advice_on_a_data_frame(spark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    df = spark.createDataFrame([([1.0, 2.0, 3.0, 4.0], "a")] * 30, "features array<float>, label string")
    model = kd.Model.of(nn.Linear(4, 2), shape=(4,), labels=["a", "b"])
    advice = kd.advise(model, df, workers=2, epochs=3)
    shown = capsys.readouterr().out
    assert "30 rows, 10 trainable weights" in shown
    assert [option.workers for option in advice.options] == [1, *[2] * (len(advice.options) - 1)]
    assert advice.pick.workers == 1  # thirty rows: there is nothing to share out
    assert "One machine would be faster" in shown
    assert f"-> {advice.pick.name}" in shown
    quiet = kd.advise(model, df, workers=2, rows=10**9, bandwidth_gbit_s=1.0, show=False)
    assert quiet.job.rows == 10**9
    assert capsys.readouterr().out == ""
    with pytest.raises(DataError, match="no column 'nonsense'"):
        kd.advise(model, df, target="nonsense")
    with pytest.raises(ConfigError, match="epochs=0 describes no training"):
        kd.advise(model, df, epochs=0)
