"""Memory that a step frees is there for the next one, and nothing else changes."""

import subprocess
import sys

import pytest

from ssfl_app.training import malloc

FAULTS = """
import resource
import numpy as np
from ssfl_app.training.malloc import keep_heap

if {keep}:
    assert keep_heap() and keep_heap()
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    small = [np.ones(2**17) for _ in range(24)]  # 1 MB each, as the activations of a small model
    del small
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""


def faults(keep: bool) -> list[int]:
    said = subprocess.run(
        [sys.executable, "-c", FAULTS.format(keep=keep)], check=True, capture_output=True, text=True
    )
    return [int(word) for word in said.stdout.split()]


def test_pages_are_taken_once() -> None:
    """24 MB are 6,144 pages of 4 kB: glibc takes them for every step, unless it was told to keep them."""
    if not hasattr(malloc.ctypes.CDLL(None), "mallopt"):
        pytest.skip("not glibc")
    kept, default = faults(True), faults(False)
    assert max(kept[1:]) < 100
    assert min(default[1:]) > 1000


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: object())
    assert malloc.keep_heap.__wrapped__() is False
    assert malloc.return_freed_memory() is False
