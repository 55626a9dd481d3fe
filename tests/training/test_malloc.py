"""Memory that a step frees is there for the next one: what glibc is told, and that others are left alone."""

import pytest

from ssfl_app.training import malloc


class FakeLibrary:
    """A C library that notes what it is told, and takes it or not."""

    def __init__(self, answer: int) -> None:
        self.told: dict[int, int] = {}
        self.answer = answer

    def mallopt(self, parameter: int, value: int) -> int:
        self.told[parameter] = value
        return self.answer


@pytest.mark.parametrize("answer", [1, 0])
def test_buffers_are_kept_up_to_the_largest_and_the_heap_is_never_trimmed(
    monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    library = FakeLibrary(answer)
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: library)
    assert malloc.keep_heap.__wrapped__() is bool(answer)
    if answer:  # numbers of malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        assert library.told == {-3: 32 * 1024 * 1024, -1: -1}


def test_glibc_takes_it() -> None:
    if not hasattr(malloc.ctypes.CDLL(None), "mallopt"):
        pytest.skip("not glibc")
    assert malloc.keep_heap()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: object())
    assert malloc.keep_heap.__wrapped__() is False
    assert malloc.return_freed_memory() is False
