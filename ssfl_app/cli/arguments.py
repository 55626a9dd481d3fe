"""Arguments that several commands have."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

ConfigFile = Annotated[Path | None, Argument(metavar="[CONFIG.toml]", help="Keys that differ from the defaults.")]
Override = Annotated[
    list[str] | None,
    Option("-c", "--config", metavar="KEY=VALUE", help="Further keys: \"strategy='random' mask.density=0.05\"."),
]
Engine = Annotated[str, Option(help="inline: without Ray; ray: Flower's simulation.")]
RayAddress = Annotated[
    str, Option(metavar="HOST:PORT", help="Engine ray on a cluster that is up; auto: as Ray finds it.")
]
RayWithoutToken = Annotated[bool, Option("--ray-without-token", help="Also where that cluster runs anybody's code.")]
Out = Annotated[Path | None, Option(help="Run folder.", show_default="runs/<time>-<strategy>-<dataset>")]
Resume = Annotated[Path | None, Option(help="Go on with the run in this folder.")]
