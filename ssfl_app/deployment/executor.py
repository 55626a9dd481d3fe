"""Answers a SuperNode's messages, each in a process of its own that is a fork of a warm one.

Stands in for ``flower-superexec`` beside a SuperNode that runs with ``--isolation process``. That starts a Python for
each message, which imports torch and opens the data set before it does what the message asks. Here

- this process imports torch, and waits for the SuperNode to say that there is a message of a run;
- for the first message of a run it forks a `Zygote`, which loads the run's app and has it open data and model
  (`LazyClientApp.prepare`), by the run's configuration and that of the node; it never sees a message;
- for each message the zygote forks a process that claims it, answers it by Flower's own ``run_clientapp``, and ends.

So a message's process knows nothing of the messages before it, as Flower has it. Flower's protocol asks for that too:
a token is for one task, its holder pulls the task once and ends with it, and nobody else can answer in its place.

A process may only be forked safely while it has one thread. A zygote that has more after it got ready, by a library
that the app imports, say, or that would have to use a GPU, is not used: messages of that run are forked from this
process, and load the app and the data themselves.
"""

import ctypes
import functools
import gc
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from logging import INFO, WARN
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 - what takes longest to import of all that an answer needs: optimizers do it
from flwr.app import Context, RecordDict
from flwr.clientapp.utils import get_load_client_app_fn
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore import log
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import run_clientapp

from ssfl_app.comm import flower_patches

LOOK = 3.0
"""Seconds after which it looks for a message by itself, as a SuperNode told it of none: one may have come while the
executor was started again."""

IDLE = 600.0
"""Seconds without a message after which the memory of a zygote is given back."""

READY = b"+"
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
PROTECTED = frozenset({"/flwr.proto.Runtime/AcquireTask"})
"""Calls that the secret proves the right to."""

Recipe = dict[str, Any]
"""What the SuperNode knows of a run: its number, app and configuration, and the node's own."""


def end_with(parent: int) -> None:
    """Have the kernel end this process as soon as its parent is gone, however that ends; exit if it is gone already.

    On other systems than Linux a process ends with its pipe, or as Flower's do by looking for its parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def fork(work: Callable[[], None]) -> None:
    """Do some work in a process of its own, a fork of this one, which ends with this one; nobody waits for it."""
    parent = os.getpid()
    if os.fork():
        return
    code = 1
    try:
        end_with(parent)
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # what this process would do at its end is its parent's to do


def threads() -> int:
    """Return how many threads this process has, those of libraries too where the system says so."""
    try:
        return len(list(Path("/proc/self/task").iterdir()))
    except OSError:
        return threading.active_count()


def answer(address: str, token: str) -> None:
    """Be the ClientApp of one message; it is `main` of ``flwr-clientapp``."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    with suppress(OSError):
        Path("/proc/self/comm").write_text("flwr-clientapp", encoding="ascii")
    run_clientapp(address, token, insecure=True, parent_pid=os.getppid())


def prepare(recipe: Recipe) -> bool:
    """Load the app of a run and have it open what its messages need; return whether this process can be forked."""
    fab_id, fab_version, fab_hash = recipe["fab"]
    app = get_load_client_app_fn("", None, True)(fab_id, fab_version, fab_hash)
    own = getattr(app, "prepare", None)
    if own is None:  # somebody else's app: what it does when it is imported nobody knows
        return False
    own(
        Context(
            run_id=recipe["run_id"],
            node_id=recipe["node_id"],
            node_config=recipe["node_config"],
            state=RecordDict(),
            run_config=recipe["run_config"],
        )
    )
    flower_patches.installed(fab_hash)
    gc.collect()
    gc.freeze()  # a collection in a fork would touch, and so copy, all that is shared
    return threads() == 1


class Zygote:
    """A process that is ready for the messages of one run; made in `prepare`'s time.

    `ready` says whether it can be used; if not, it is gone.
    """

    def __init__(self, address: str, recipe: Recipe) -> None:
        self.run_id = int(recipe["run_id"])
        self._channel, theirs = socket.socketpair()

        def live() -> None:
            self._channel.close()
            try:
                ready = prepare(recipe)
            except Exception as error:  # the message's own process meets it again, and tells the server
                log(WARN, "run %s: not opened beforehand: %s: %s", recipe["run_id"], type(error).__name__, error)
                return
            if not ready:
                log(INFO, "run %s: its app, a GPU or threads do not let it be opened beforehand", recipe["run_id"])
                return
            theirs.sendall(READY)
            with theirs.makefile("r") as tokens:
                for line in tokens:
                    fork(functools.partial(answer, address, line.strip()))

        fork(live)
        theirs.close()
        self.ready = self._channel.recv(1) == READY

    def answer(self, token: str) -> bool:
        """Have a fork of it answer the message with this token; return whether it is there to do so."""
        try:
            self._channel.sendall(token.encode() + b"\n")
        except OSError:
            return False
        return True

    def close(self) -> None:
        """End it."""
        self._channel.close()


class Executor:
    """Claims a SuperNode's tasks and has them answered."""

    def __init__(self, address: str, client: RuntimeHttpClient) -> None:
        self._address, self._client = address, client
        self._zygote: Zygote | None = None

    def serve(self, pipe: int) -> None:
        """Serve until the SuperNode closes its end of the pipe, on which each line, a recipe, stands for a task."""
        waited, rest = 0.0, b""
        while True:
            if not select.select([pipe], [], [], LOOK)[0]:
                waited += LOOK
                if waited > IDLE:
                    self._close()
                self.claim({})
                continue
            said = os.read(pipe, 2**16)
            if not said:
                return
            waited, (*lines, rest) = 0.0, (rest + said).split(b"\n")
            for line in lines:
                self.claim(json.loads(line))

    def claim(self, recipe: Recipe) -> None:
        """Get ready for the run of `recipe`, if there is one, and have the next task answered, if there is one."""
        if recipe and (self._zygote is None or self._zygote.run_id != recipe["run_id"]):
            self._close()
            self._zygote = Zygote(self._address, recipe)
        told = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if not told.token:
            return
        zygote = self._zygote
        if zygote is not None and zygote.ready and zygote.run_id == told.task.run_id:
            if zygote.answer(told.token):
                return
            log(WARN, "run %s: the process that was ready for its messages is gone", zygote.run_id)
            self._close()
        fork(functools.partial(answer, self._address, told.token))

    def _close(self) -> None:
        if self._zygote is not None:
            self._zygote.close()
        self._zygote = None


def main(address: str, secret: Path, parent: int) -> None:
    """Serve the SuperNode that is process `parent`, whose Runtime API is at host:port."""
    end_with(parent)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a fork ended
    # By NVML, for where it is CUDA that says so, no fork can use the GPU.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    interceptors: list[ProtobufClientInterceptor] = [
        RuntimeVersionHttpInterceptor(component_name="SuperExec"),
        SuperExecAuthHttpInterceptor(master_secret=secret.read_bytes(), protected_methods=PROTECTED),
    ]
    client = RuntimeHttpClient.from_server_address(
        address, True, None, interceptors, retry_invoker=make_simple_http_retry_invoker()
    )
    # The app of a run is the server's copy of this very package, from a folder of its own.
    for name in [name for name in sys.modules if name.partition(".")[0] == "ssfl_app"]:
        del sys.modules[name]
    Executor(address, client).serve(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
