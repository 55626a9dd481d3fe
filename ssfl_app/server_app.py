"""Flower's server door: read the configuration, build the strategy, start it, and write the run folder."""

import contextlib
import functools
import json
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from ssfl_app import guard
from ssfl_app.config import Flat, difference, read_file, write_toml
from ssfl_app.exchange import fewer_at_once, is_simulation
from ssfl_app.guard import RunFailed, naming_memory
from ssfl_app.local.holdings import Holding, other_images, read_holding
from ssfl_app.local.holdings import difference as unlike
from ssfl_app.options import ConfigError
from ssfl_app.results.files import write_atomically, write_json
from ssfl_app.results.recorder import Recorder, default_folder
from ssfl_app.results.report import final_text, write_report
from ssfl_app.results.runs import read_run
from ssfl_app.sparsity.layout import load_state
from ssfl_app.strategies import REGISTRY
from ssfl_app.strategies.base import SparseStrategy
from ssfl_app.strategies.course import Record
from ssfl_app.wire import Facts
from ssfl_app.workshop import Workshop, code_digest, open_workshop

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured strategy on this grid.

    Raises
    ------
    ConfigError
        The configuration cannot be run; nothing was written.
    RunFailed
        The run broke off; the run folder holds its checkpoint and the reason.
    """
    guard.end_with_launcher()
    if engine_name(grid) != "inline":  # where clients train in this process, it would cost them time
        guard.return_freed_memory()
    with naming_memory(fewer_at_once(grid)):
        workshop = open_workshop(dict(context.run_config))
    config = workshop.config
    run = config.settings.run
    folder = Path(run.out) if run.out else Path.cwd() / default_folder(config.strategy, config.data.name)
    check_folder(folder, config.flat)
    # Flushed: Flower forwards what a ServerApp prints, and a round should be seen when it is over.
    recorder = Recorder(folder, write_toml(config.flat), run.rounds, lambda line: print(line, flush=True))
    try:
        with naming_memory(fewer_at_once(grid)):
            conduct(grid, workshop, recorder)
        recorder.status("finished")
    except Exception as error:
        named = isinstance(error, ConfigError | RunFailed)
        recorder.status("failed", str(error) if named else f"{type(error).__name__}: {error}")
        raise
    finally:
        recorder.close()


def check_folder(folder: Path, flat: Flat) -> None:
    """Refuse a folder that holds another run; `ssfl run` has checked this already, plain `flwr run` has not.

    Raises
    ------
    ConfigError
        It holds a run that is not to be resumed, or one of another configuration.
    """
    if not (folder / "config.toml").exists():
        return
    if not flat["run.resume"]:
        raise ConfigError(f"run.out is {folder}; it holds a run already: go on with run.resume, or name another one")
    clash = difference(flat, read_file(folder / "config.toml"))
    if clash is not None:
        raise ConfigError(f"run.out is {folder}; {clash}")


def conduct(grid: Grid, workshop: Workshop, recorder: Recorder) -> None:
    """Play a run, new or resumed, from the first greeting to the report."""
    config, run = workshop.config, workshop.config.settings.run
    strategy = REGISTRY[config.strategy](workshop.layout, config.settings)
    strategy.watch = Watcher(recorder, workshop)
    if not workshop.own:
        strategy.post.dealt = functools.cache(workshop.holding)
    strategy.workbench, strategy.image_shape = workshop.model, workshop.data.shape
    if is_simulation(grid):  # clients share this machine; elsewhere each keeps its own in Flower's state
        strategy.post.folder = recorder.folder / "clients"
    else:
        strategy.post.token = run_token(recorder.folder)
    checkpoint = recorder.resume() if run.resume else None
    if checkpoint is not None:
        strategy.restore(*checkpoint)
        strategy.post.roster.expected = site_names(recorder.folder)
        recorder.say(f"resuming after round {checkpoint[0]}")
    # Not kept in a variable: the initial weights would stay in memory for the whole run.
    strategy.start(grid, ArrayRecord(workshop.initial_state()), run.rounds, evaluate_fn=central_evaluation(workshop))
    strategy.watch.accuracies()
    facts: Record = {
        "strategy": config.strategy,
        "dataset": config.data.name,
        "partition": "sites" if workshop.own else config.partition.name,
        "model": config.model.name,
        "clients": run.clients,
        "cohort": run.cohort,
        "trained_clients": len(strategy.cohort(1)),
        "rounds": run.rounds,
        "seed": run.seed,
        "engine": engine_name(grid),
    }
    summary = recorder.finish(facts, workshop.layout, strategy.model(), strategy.mask)
    write_report([read_run(recorder.folder)], recorder.folder / "report.html")
    recorder.say(final_text(summary, recorder.folder))


def run_token(folder: Path) -> str:
    """Return what real clients call this run in the names of files: drawn at its start, the same on resuming."""
    path = folder / "checkpoint" / "token"
    with contextlib.suppress(OSError):
        if re.fullmatch("[0-9a-f]{16}", token := path.read_text().strip()):
            return token
    token = secrets.token_hex(8)
    write_atomically(path, lambda file: file.write_text(token + "\n"))
    return token


def site_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the sites of the run in a folder, by client; empty if its clients have none."""
    try:
        rows = json.loads((folder / "clients.json").read_text())["clients"]
        return tuple(str(row["name"]) for row in sorted(rows, key=lambda row: int(row["client"])))
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def engine_name(grid: Grid) -> str:
    """Return inline, ray or deployment."""
    if getattr(grid, "in_process", False):
        return "inline"
    return "ray" if is_simulation(grid) else "deployment"


def central_evaluation(workshop: Workshop) -> Callable[[int, ArrayRecord], MetricRecord] | None:
    """Return Flower's evaluate_fn, loss and accuracy of the global model on the whole test set; None without one."""
    if not len(workshop.data.test):
        return None

    def evaluate(_: int, arrays: ArrayRecord) -> MetricRecord:
        load_state(workshop.model, {n: torch.from_numpy(a.numpy()) for n, a in arrays.items()})
        loss, accuracy = workshop.trainer.evaluate(workshop.model, workshop.data.test)
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    return evaluate


class Watcher:
    """Sees the run go by and has it recorded."""

    def __init__(self, recorder: Recorder, workshop: Workshop) -> None:
        self.recorder = recorder
        self.workshop = workshop
        self._sites: dict[int, Facts] = {}

    def met(self, sites: Mapping[int, Facts]) -> None:
        """Compare code, label sets and image shapes, name devices, and describe the run in a few lines.

        Raises
        ------
        RunFailed
            A client runs other code than the server, or holds images of other classes or another shape.
        """
        self._sites = dict(sites)
        for client, facts in sorted(sites.items()):
            if facts.get("code") != code_digest():
                raise RunFailed(
                    f"client {client} runs other code ({facts.get('code')!r}) than the server ({code_digest()!r}): "
                    "install the same version on both, or start Flower's SuperLink from another folder"
                )
        config, data = self.workshop.config, self.workshop.data
        compare_holdings(sites, self.workshop)
        devices = ", ".join(sorted({str(facts.get("device", "unknown device")) for facts in sites.values()}))
        dealt = "own data" if self.workshop.own else f"{config.partition.name} partition"
        self.recorder.say(
            f"{config.strategy} on {data.name}: {len(sites)} clients on {devices}, {dealt}, "
            f"{config.model.name} with {self.workshop.layout.size:,} parameters"
        )
        if any(facts.get("gpu-is-hidden") for facts in sites.values()):
            self.recorder.say(
                "note: this machine has a GPU, but Flower hides it from the clients (num-gpus 0): they train "
                "on the CPU. `ssfl run` gives it to them; with `flwr run` set client-resources-num-gpus"
            )
        self._write_clients({})

    def warn(self, line: str) -> None:
        """Tell people."""
        self.recorder.say(f"warning: {line}")

    def round(self, record: Record, strategy: SparseStrategy) -> None:
        """Record a round; take a checkpoint when one is due."""
        self.recorder.round(record)
        run = self.workshop.config.settings.run
        if record["round"] % run.checkpoint_every == 0 or record["round"] == run.rounds:
            self.recorder.checkpoint(record["round"], strategy.snapshot())

    def accuracies(self) -> None:
        """Add the last known accuracy of every client to clients.json."""
        known: dict[str, dict[str, float]] = {"accuracy": {}, "personal_accuracy": {}}
        for record in self.recorder.records:
            known["accuracy"] |= record.get("local_accuracy", {})
            known["personal_accuracy"] |= record.get("personal_accuracy", {})
        self._write_clients(known)

    def _write_clients(self, known: Mapping[str, Mapping[str, float]]) -> None:
        shop, clients = self.workshop, []
        for client in range(shop.config.settings.run.clients):
            facts = self._sites.get(client, {})
            held = read_holding(facts) if shop.own else shop.holding(client)
            clients.append(
                {
                    "client": client,
                    **({"name": str(facts["name"])} if "name" in facts else {}),
                    "train": list(held.counts),
                    "test_images": held.test_images,
                    **{name: known.get(name, {}).get(str(client)) for name in ("accuracy", "personal_accuracy")},
                }
            )
        names = list(shop.data.class_names)
        write_json(self.recorder.folder / "clients.json", {"class_names": names, "clients": clients})


def compare_holdings(sites: Mapping[int, Facts], workshop: Workshop) -> None:
    """Compare what clients say that they hold, among each other and with the server.

    Raises
    ------
    RunFailed
        Label sets or image shapes differ; the message names both sides, what differs, and the cure. Or a client's
        copy of a shared data set is another one than the server's.
    """
    first: tuple[str, Holding] | None = None
    for client, facts in sorted(sites.items()):
        if "classes" not in facts:  # another version of this code, which does not say; `met` ends such a run
            continue
        who = str(facts.get("name", f"client {client}"))
        held = read_holding(facts)
        first = first or (who, held)
        dealt = workshop.holding(client)
        why = unlike(*first, who, held) or unlike(who, held, "the server", dealt)
        if why is not None:
            raise RunFailed(why)
        if not workshop.own and (why := other_images(who, held, dealt)) is not None:
            raise RunFailed(why)
