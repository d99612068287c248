"""The manifest of a machine, from planted files and from this one."""

import subprocess
from pathlib import Path

import msgspec

from ctxbench import env


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_planted_machine_is_described(tmp_path):
    cpu = "sys/devices/system/cpu/cpu0"
    root = plant(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: Planted 9000\nflags\t\t: fpu avx2 hypervisor\n",
            f"{cpu}/cache/index0/level": "1\n",
            f"{cpu}/cache/index0/type": "Data\n",
            f"{cpu}/cache/index0/size": "48K\n",
            f"{cpu}/cache/index2/level": "2\n",
            f"{cpu}/cache/index2/type": "Unified\n",
            f"{cpu}/cache/index2/size": "1024K\n",
            f"{cpu}/topology/thread_siblings_list": "0-1,8\n",
            f"{cpu}/cpufreq/scaling_governor": "performance\n",
            "proc/meminfo": "MemTotal:       1024 kB\nMemAvailable:    512 kB\n",
            "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
            "proc/self/cgroup": "0::/job\n",
            "sys/fs/cgroup/job/memory.max": "2048\n",
            "sys/fs/cgroup/job/cpu.max": "100000 100000\n",
            "proc/pressure/cpu": "some avg10=3.00 avg60=2.00 avg300=1.00 total=5\n",
        },
    )
    seen = env.fingerprint(root)
    assert seen["cpu"]["model"] == "Planted 9000"
    assert seen["cpu"]["caches"] == {"L1d": "48K", "L2": "1024K"}
    assert seen["cpu"]["threads_per_core"] == 3
    assert seen["cpu"]["vector"] == ["avx2"]
    assert seen["cpu"]["hypervisor"] is True
    assert seen["cpu"]["governor"] == "performance"
    assert seen["memory"] == {"total_bytes": 2**20, "available_bytes": 2**19, "huge_pages": "madvise"}
    assert seen["limits"] == {"memory_bytes": 2048, "cpu": "100000 100000"}
    assert seen["load"]["pressure_cpu"].startswith("some avg10=3.00")


def test_limits_of_the_older_control_groups_are_read(tmp_path):
    files = {"proc/self/cgroup": "4:memory:/job\n0::/\n", "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "4096\n"}
    assert env.fingerprint(plant(tmp_path, files))["limits"] == {"memory_bytes": 4096}


def test_an_unlimited_control_group_is_no_limit(tmp_path):
    files = {"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.max": "max\n"}
    assert "limits" not in env.fingerprint(plant(tmp_path, files))


def test_a_machine_that_tells_nothing_is_still_described(tmp_path):
    seen = env.fingerprint(tmp_path)
    assert seen["python"]["version"]
    assert "memory" not in seen


def test_this_machine_is_described_in_plain_values():
    seen = env.fingerprint()
    assert msgspec.json.decode(msgspec.json.encode(seen)) == seen
    assert seen["packages"]["ctxbench"]
    assert seen["packages"]["torch"]
    assert seen["cpu"]["model"]
    assert seen["compiler"]["command"]
    assert any(character.isdigit() for character in seen["compiler"]["version"])


def test_a_machine_without_a_compiler_names_none(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "compiler" not in env.fingerprint()


def test_packages_that_are_absent_are_left_out():
    assert list(env.packages(["numpy", "no-such-distribution"])) == ["numpy"]


def test_the_state_of_a_checkout_is_named_and_changes_are_seen(tmp_path):
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    plant(tmp_path, {"file": "one"})
    git("add", "file")
    git("commit", "-m", "first")
    clean = env.git_state(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["changed"] is False
    plant(tmp_path, {"file": "two"})
    assert env.git_state(tmp_path)["changed"] is True


def test_a_folder_outside_a_checkout_has_no_state(tmp_path):
    assert env.git_state(tmp_path) == {}
