"""What needs no torch on a node does not import it: Flower starts a process for each message."""

import subprocess
import sys

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
