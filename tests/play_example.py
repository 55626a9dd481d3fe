"""Plays an example app in this process, without Flower's: ``python -m tests.play_example FOLDER NODES [key=value]``.

What it prints and logs is what it prints and logs under ``flwr run``.
"""

import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from ssfl_app.simulation.in_process import InlineGrid


def main() -> None:
    folder, nodes, keys = Path(sys.argv[1]), int(sys.argv[2]), dict(word.split("=") for word in sys.argv[3:])
    sys.path.insert(0, str(folder))
    app: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    config = app["config"] | {key: type(app["config"][key])(value) for key, value in keys.items()}

    def component(name: str) -> Any:
        module, _, attribute = app["components"][name].partition(":")
        return getattr(import_module(module), attribute)

    grid = InlineGrid(component("clientapp"), config, {1000 + partition: partition for partition in range(nodes)})
    component("serverapp")(grid, Context(1, 0, node_config={}, state=RecordDict(), run_config=config))


if __name__ == "__main__":
    main()
