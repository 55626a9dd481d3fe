"""Python imports this at its start in the drills of slow uploads: a SuperNode waits before each object it uploads.

The file that DRILL_UPLOAD names holds the seconds; while there is none, uploads are as ever. DRILL_VICTIM is the
node.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_words = " ".join(sys.orig_argv)
if (
    "DRILL_UPLOAD" in os.environ
    and "ssfl_app.deployment.supernode" in _words
    and f"/{os.environ['DRILL_VICTIM']}/" in _words
):
    from flwr.supercore.inflatable import inflatable_utils

    _file, _push = Path(os.environ["DRILL_UPLOAD"]), inflatable_utils.push_object_contents_from_iterable

    def _slowly(contents: Any, push_object_fn: Callable[[str, bytes], None], **options: Any) -> None:
        def wait_and_push(object_id: str, content: bytes) -> None:
            began = time.monotonic()
            while _file.exists() and time.monotonic() - began < float(_file.read_text()):
                time.sleep(0.2)
            push_object_fn(object_id, content)

        _push(contents, wait_and_push, **options)

    inflatable_utils.push_object_contents_from_iterable = _slowly
