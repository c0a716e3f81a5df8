"""The memory that a process may use is that of its container, not of the host."""

import pytest

from vl2_jax.memory import usable_memory

GIB = 2**30


def machine(root, groups, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal:       67108864 kB\nMemFree: 1 kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "gib"),
    [
        ("0::/\n", {}, 64),
        ("0::/\n", {"memory.max": "max\n"}, 64),
        ("0::/\n", {"memory.max": f"{12 * GIB}\n"}, 12),
        ("0::/system.slice/one.scope\n", {"system.slice/memory.max": f"{8 * GIB}\n"}, 8),
        ("0::/a/b\n", {"a/b/memory.max": f"{9 * GIB}\n", "a/memory.max": f"{5 * GIB}\n"}, 5),
        ("0::/of/the/host\n", {"memory.max": f"{12 * GIB}\n"}, 12),
        ("4:memory:/docker/1f\n", {"memory/docker/1f/memory.limit_in_bytes": f"{6 * GIB}\n"}, 6),
        ("4:cpu,memory:/docker/1f\n", {"memory/memory.limit_in_bytes": f"{7 * GIB}\n"}, 7),
        ("4:memory:/\n0::/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 64),
        ("4:cpu:/x\nnonsense\n", {"memory.max": f"{12 * GIB}\n"}, 64),
    ],
)
def test_limits_of_control_groups_count(tmp_path, groups, files, gib):
    assert usable_memory(machine(tmp_path, groups, files)) == gib * GIB


def test_this_machine_has_memory():
    assert usable_memory() > GIB
