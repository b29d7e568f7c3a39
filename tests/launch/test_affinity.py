"""A rank keeps to the cores beside its GPU, where the machine tells them and enough are ours."""

import os
import subprocess
import sys

import pytest

from megalite import affinity
from megalite.affinity import own_cores, parse_cores, pci_address, stay_near

pytestmark = pytest.mark.fast

ADDRESS = "0000:1b:00.0"


@pytest.mark.parametrize(("text", "cores"), [("0-2,8-9\n", {0, 1, 2, 8, 9}), ("5", {5}), ("\n", set()), ("0-0", {0})])
def test_lists_of_cores(text, cores):
    assert parse_cores(text) == cores


@pytest.mark.parametrize(
    ("text", "ours", "kept"),
    [
        ("8-15,40-47", range(64), {*range(8, 16), *range(40, 48)}),
        ("8-15", range(12), {8, 9, 10, 11}),
        ("8-15", range(11), set(range(11))),  # three of ours are near: another's choice is left alone
        ("many", range(11), set(range(11))),
        (None, range(11), set(range(11))),
    ],
)
def test_what_is_kept_to(tmp_path, monkeypatch, text, ours, kept):
    chosen = [set(ours)]
    monkeypatch.setattr(affinity, "own_cores", lambda: chosen[-1])
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: chosen.append(cores))
    if text is not None:
        (tmp_path / ADDRESS).mkdir()
        (tmp_path / ADDRESS / "local_cpulist").write_text(text)
    stay_near(ADDRESS, tmp_path)
    assert chosen[-1] == kept


DRIVER = """
#include <cstring>
extern "C" int cuInit(unsigned) { return 0; }
extern "C" int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 5; return ordinal > 1; }
extern "C" int cuDeviceGetPCIBusId(char *text, int size, int device) {
    std::strncpy(text, "0000:1B:00.0", size);
    return device != 6;
}
"""


def test_where_a_gpu_sits(tmp_path):
    """By a pretended driver, which knows two GPUs and does not tell where the first is."""
    (tmp_path / "driver.cpp").write_text(DRIVER)
    library = tmp_path / "driver.so"
    subprocess.run(["c++", "-shared", "-fPIC", "-o", library, tmp_path / "driver.cpp"], check=True)
    assert [pci_address(gpu, str(library)) for gpu in range(3)] == ["", ADDRESS, ""]
    assert pci_address(0, "libnowhere.so") == ""


def test_the_cores_of_this_process():
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " \
              "from megalite.affinity import own_cores; print(len(own_cores()))"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "1\n"
    assert own_cores()
