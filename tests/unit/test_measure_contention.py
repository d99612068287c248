"""Sensors of other work, read from planted kernel files."""

import dataclasses
from pathlib import Path

import pytest

from ctxbench.measure import contention


def plant(proc: Path, ran: int, waited: int, pressure: float, stalled: int) -> Path:
    for thread in ("11", "12"):
        task = proc / "self" / "task" / thread
        task.mkdir(parents=True, exist_ok=True)
        (task / "schedstat").write_text(f"{ran} {waited} 5\n")
    (proc / "pressure").mkdir(exist_ok=True)
    for kind in ("cpu", "memory"):
        (proc / "pressure" / kind).write_text(
            f"some avg10={pressure:.2f} avg60=1.00 avg300=0.50 total={stalled}\nfull avg10=0.00 avg60=0.00 total=0\n"
        )
    return proc


@pytest.mark.parametrize(
    ("waited", "pressure", "stalled_us", "contended"),
    [
        (0, 0.0, 0, False), (50, 5.0, 100_000, False), (150, 0.0, 0, True), (0, 35.0, 350_000, True),
        (0, 90.0, 20_000, False), (0, 5.0, 350_000, True),
    ],
    ids=["quiet", "little delay", "delayed", "under pressure", "pressure ended before", "pressure too new"],
)  # fmt: skip
def test_a_measurement_is_contended_by_delay_or_by_pressure_while_it_lasts(
    tmp_path, waited, pressure, stalled_us, contended
):
    before = contention.read(plant(tmp_path, 0, 0, 0.0, 7))
    after = contention.read(plant(tmp_path, 1000 - waited, waited, pressure, 7 + stalled_us))
    sensors, seen = contention.between(before, dataclasses.replace(after, at=before.at + 1.0))
    assert seen is contended
    assert sensors["delay_share"] == pytest.approx(waited / 1000)
    assert sensors["psi_cpu_share"] == pytest.approx(stalled_us * 1e-6)
    assert sensors["psi_cpu_avg10"] == pressure


def test_absent_sensors_are_none_with_a_reason(tmp_path):
    reading = contention.read(tmp_path)
    sensors, contended = contention.between(reading, reading)
    assert not contended
    assert sensors["delay_share"] is None
    assert "schedstat" in sensors["delay_share_reason"]
    assert sensors["psi_cpu_share"] is None
    assert "pressure/cpu" in sensors["psi_cpu_reason"]


def test_the_sensors_of_this_machine_can_be_read_or_say_why():
    before = contention.read()
    sum(range(10**5))
    sensors, _ = contention.between(before, contention.read())
    for name in ("delay_share", "psi_cpu_share", "psi_memory_share"):
        assert (
            isinstance(sensors[name], float)
            or sensors[f"{name.removesuffix('_share')}_reason" if "psi" in name else f"{name}_reason"]
        )
    assert sensors["minor_faults"] >= 0
