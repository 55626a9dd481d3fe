"""Encode and decode arrays with NNCodec, in its own virtual environment: nncodec_peer.py IN.npz OUT.npz QP...

IN.npz holds float32 arrays. OUT.npz holds what comes back, as "<qp>/<name>", and "<qp>": bytes, and seconds to encode
and to decode.
"""

import sys
import tempfile
import time

import numpy as np
from nncodec import nn


def main() -> None:
    given, out, *steps = sys.argv[1:]
    arrays = dict(np.load(given).items())
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        options = {"verbose": False, "results": folder}
        for step in steps:
            began = time.perf_counter()
            stream = nn.encode(arrays, {**options, "qp": int(step)})
            encoded = time.perf_counter()
            back = nn.decode(stream, options)
            decoded = time.perf_counter()
            found[step] = np.array([len(stream), encoded - began, decoded - encoded])
            found |= {f"{step}/{name}": np.asarray(back[name]) for name in arrays}
    np.savez(out, **found)


if __name__ == "__main__":
    main()
