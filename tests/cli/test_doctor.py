"""The doctor names what is there, what is missing, and what to do about it."""

from __future__ import annotations

import pytest

from ctxbench.cli import doctor
from ctxbench.errors import Exit


def test_doctor_reports_the_measuring_processes_own_view(ctxbench):
    report = ctxbench("doctor", "--quick", "--json").json
    topics = {finding["topic"]: finding for finding in report["findings"]}
    assert topics["threads"]["level"] == "ok"
    assert "dense" in topics["methods"]["found"]
    assert topics["energy"]["level"] in ("ok", "note")
    assert report["environment"]["packages"]["torch"]


def test_every_missing_extra_comes_with_its_install_line(ctxbench):
    findings = ctxbench("doctor", "--quick", "--json").json["findings"]
    missing = [finding for finding in findings if finding["found"].startswith("missing")]
    assert all(finding["advice"].startswith("pip install 'ctxbench[") for finding in missing)


def test_absent_cuda_is_an_unusable_environment(ctxbench):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    result = ctxbench("doctor", "--quick", "--device", "cuda:0")
    assert result.code == Exit.ENVIRONMENT
    assert "torch sees no CUDA device" in result.out


def test_an_unknown_device_is_a_usage_error(ctxbench):
    result = ctxbench("doctor", "--device", "tpu")
    assert (result.code, "unknown device 'tpu'" in result.err) == (Exit.USAGE, True)


@pytest.mark.parametrize(
    ("rates", "level"),
    [([1.0e11, 1.02e11, 0.99e11], "ok"), ([1.0e11, 0.6e11, 1.0e11], "warning"), ([1.0e11], "warning"), ([], "warning")],
    ids=["quiet", "noisy", "one process", "none"],
)
def test_noise_is_judged_by_the_spread_over_processes(rates, level):
    assert doctor._noise([{"fp32": rate} for rate in rates]).level == level
