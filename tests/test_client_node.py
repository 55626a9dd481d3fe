"""What needs no torch on a node does not import it: Flower starts a process for each message."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from ssfl_app.client_node import memory_of
from ssfl_app.comm.node_config import read_node_config
from ssfl_app.sparsity.values import PayloadError

SCRIPT = """
import sys
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from ssfl_app.client_node import NodeError
from ssfl_app.lazy_client_app import app
from ssfl_app.simulation.worker_pool import set_task_identity

set_task_identity()
facts = ConfigRecord({"round": 1, "exchange": 7, "about": "x"})
content = RecordDict({"arrays": ArrayRecord(), "facts": facts})
keys = {"data.where": "shared", "privacy.secure-aggregation": True}
context = Context(run_id=1, node_id=2, node_config={"partition-id": 0}, state=RecordDict(), run_config=keys)
message = Message(content, 2, "query.unmask")
try:
    app(message, context)
except NodeError as error:
    print(error)
print("torch" in sys.modules)
"""


def test_the_second_exchange_of_secure_aggregation_waits_for_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == [
        "PayloadError: exchange is 7; this client sent no masked answer in it",
        "False",
    ]


def test_what_was_masked_is_remembered_as_long_as_the_key(tmp_path: Path) -> None:
    """Not in the folder of the run, which people remove: the key and the run's token make the same masks again."""
    token = "0123456789abcdef"

    def memory() -> Any:
        context = Context(0, 0, {}, RecordDict(), {})
        place = read_node_config({"partition-id": 3, "num-partitions": 4, "state-path": str(tmp_path)}, "shared")
        return memory_of(context, place, 3, {"run": token})

    memory().keep("d" * 16, np.zeros(1, np.uint8))
    memory().note_masked(5, 1)
    shutil.rmtree(tmp_path / token)
    with pytest.raises(PayloadError, match="has masked that of 5 already"):
        memory().note_masked(5, 1)
    assert memory().masked(5)["asked"] == 1
