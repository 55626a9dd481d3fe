"""Cores are those that this process may use, not those of the machine."""

import os

import pytest

from ssfl_app.config import parse
from ssfl_app.cores import usable_cores
from ssfl_app.simulation.in_process import clients_at_once


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_a_process_bound_to_one_core_has_one() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
        assert clients_at_once(parse({})) == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cores() == len(before)
