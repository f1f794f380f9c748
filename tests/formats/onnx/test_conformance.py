"""The ONNX project's node cases: a sample in the everyday suite, all in the long one; the page says the truth."""

from __future__ import annotations

from types import ModuleType

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def listed(conformance: ModuleType) -> set[str]:
    """Cases that the page lists as failed."""
    text = conformance.PAGE.read_text(encoding="utf-8")
    return {line.split("`")[1] for line in text.splitlines() if line.startswith("| `test_")}


def test_a_sample_of_the_cases_passes_as_the_page_says(conformance: ModuleType) -> None:
    failed = listed(conformance)
    chosen = conformance.cases()[::15]
    assert len(chosen) > 100
    for case in chosen:
        outcome = conformance.run_case(case)
        assert outcome.passed == (case.name not in failed), f"{case.name}: {outcome}"


@pytest.mark.parametrize(
    "name",
    [
        "test_if",
        "test_loop11",
        "test_scan9_sum",
        "test_scan_sum",
        "test_lstm_with_peepholes",
        "test_gru_seq_length",
        "test_qlinearconv",
        "test_dequantizelinear_int4",
        "test_nonmaxsuppression_two_classes",
    ],
)
def test_control_flow_recurrence_and_quantised_graphs_run_in_torch(conformance: ModuleType, name: str) -> None:
    case = next(case for case in conformance.cases() if case.name == name)
    outcome = conformance.run_case(case)
    assert outcome.passed, outcome
    assert outcome.engine == "torch"


@pytest.mark.slow
def test_all_cases_give_the_page(conformance: ModuleType) -> None:
    found = dict(conformance.outcomes())
    passed = sum(outcome.passed for outcome in found.values())
    assert passed / len(found) >= 0.9
    assert conformance.page(found) == conformance.PAGE.read_text(encoding="utf-8")
