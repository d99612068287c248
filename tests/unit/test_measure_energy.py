"""Energy comes from a counter or not at all."""

from pathlib import Path

import pytest

from ctxbench.measure import energy, telemetry


def plant(root: Path, package: int, microjoules: int, limit: int = 10**9) -> Path:
    folder = root / f"intel-rapl:{package}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    return folder


def test_a_machine_without_a_counter_says_so(tmp_path):
    counter, reason = energy.counter_for("cpu", tmp_path / "powercap")
    assert counter is None
    assert "no energy counter" in reason


def test_packages_are_added_and_a_wrap_is_understood(tmp_path):
    plant(tmp_path, 0, 5_000_000)
    plant(tmp_path, 1, 999_999_000, limit=10**9)
    counter, reason = energy.counter_for("cpu", tmp_path)
    assert (counter is not None, reason) == (True, "")
    before = counter.joules()
    plant(tmp_path, 0, 8_000_000)
    plant(tmp_path, 1, 1_000_999, limit=10**9)
    assert counter.joules(before) == pytest.approx(3.0 + 1.002, rel=1e-6)


def test_joules_are_divided_by_the_calls_of_a_two_second_window():
    class Counter:
        def joules(self, since=None):
            return 100.0 if since is None else 30.0

    now = iter([0.0, 0.7, 1.4, 2.1])
    calls = []
    spent = energy.measure(lambda: calls.append(1), Counter(), lambda: None, lambda: next(now))
    assert len(calls) == 3
    assert spent == pytest.approx(10.0)


def test_a_device_without_nvml_says_so():
    with telemetry.nvml("cuda:0") as (library, _, reason):
        assert library is not None or reason
    assert telemetry.snapshot("cpu") == {}


def test_a_fallen_clock_is_throttling():
    assert telemetry.is_throttled({"sm_clock_mhz": 900.0, "default_clock_mhz": 1800.0})
    assert not telemetry.is_throttled({"sm_clock_mhz": 1700.0, "default_clock_mhz": 1800.0})
    assert not telemetry.is_throttled({"sm_clock_mhz": None})
