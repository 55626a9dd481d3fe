"""Flower's ServerApp: reads the configuration, builds the strategy, starts it, and writes the run folder."""

import contextlib
import functools
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from ssfl_app import callbacks, locks
from ssfl_app.callbacks.base import RunCallback, RunInfo
from ssfl_app.callbacks.stopping import progress
from ssfl_app.comm.exchange import fewer_at_once, is_simulation
from ssfl_app.comm.handshake import KEY, Handshake
from ssfl_app.comm.membership import Claim
from ssfl_app.comm.payload import Metadata
from ssfl_app.config import Config, Flat, first_clash, read_file
from ssfl_app.core.closing import Taken
from ssfl_app.core.rounds import Record
from ssfl_app.core.strategy import ServerContext, SparseStrategy
from ssfl_app.data.summary import mismatch, other_images, read_data_summary
from ssfl_app.files import check_regular, write_bytes, write_json
from ssfl_app.locks import RunFailed, naming_memory
from ssfl_app.options import ConfigError
from ssfl_app.privacy.accounting import Plan, budget, failure_chance
from ssfl_app.privacy.keys import fingerprint
from ssfl_app.privacy.ledger import Ledger
from ssfl_app.privacy.masking import LEAST_NEIGHBOURS
from ssfl_app.results.checkpoint import resume
from ssfl_app.results.export import described
from ssfl_app.results.recorder import Recorder, default_folder
from ssfl_app.results.report import undone, write_report
from ssfl_app.results.rows import summary_table
from ssfl_app.results.run_folder import read_run
from ssfl_app.runtime import Runtime, check_time, code_digest, get_runtime
from ssfl_app.sparsity.layout import Layout, State
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.strategies import REGISTRY
from ssfl_app.text import command, tell
from ssfl_app.training.malloc import return_freed_memory
from ssfl_app.training.tasks import AUTO

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
    locks.exit_with_parent()
    if engine_name(grid) != "inline":  # where clients train in this process, it would cost them time
        return_freed_memory()
    if engine_name(grid) == "ray":
        ease_simulation(grid)
    with naming_memory(fewer_at_once(grid)):
        runtime = get_runtime(dict(context.run_config))
    config = runtime.config
    run = config.settings.run
    folder = Path(run.out) if run.out else Path.cwd() / default_folder(config.strategy, config.data.name)
    check_folder(folder, config.flat)
    kinds = callbacks.find(run.trackers)
    try:
        trackers = {name: kind() for name, kind in kinds.items()}
    except Exception as error:
        raise ConfigError(f"run.trackers is {run.trackers!r}; one of them cannot be made: {error!r}") from error
    recorder = Recorder(folder, config.flat, tell, runtime.trainer.task.metric)
    callback = RecordingCallback(recorder, runtime, trackers)
    try:
        strategy = REGISTRY[config.strategy](server_context(grid, runtime, callback, privacy_ledger(config, folder)))
        saved = resume(strategy, folder, config.flat) if run.resume else None
        if saved is not None and config.settings.mask.frozen:
            check_frozen(strategy, runtime.initial_state())
        if saved is not None and runtime.own:
            strategy.messenger.registry.expected = site_names(folder)
        callback.ledger = strategy.ledger
        try:
            recorder.begin(saved)
            if strategy.ledger is not None:
                strategy.ledger.save()
            if saved is not None:
                recorder.say(f"resuming after round {saved.round}")
            callback.start(strategy, 0 if saved is None else saved.round + 1)
            with naming_memory(fewer_at_once(grid)):
                summary = conduct(grid, runtime, callback, strategy)
            callback.end("finished", summary)
            recorder.status("finished")
        except (KeyboardInterrupt, BrokenPipeError):  # nobody reads the lines any more: `ssfl run | head`
            with contextlib.suppress(OSError):
                recorder.status("interrupted")
                callback.end("interrupted", {})
            raise
        except Exception as error:
            named = isinstance(error, ConfigError | RunFailed)
            with contextlib.suppress(OSError):  # where the reason cannot be written, it is still raised
                recorder.status("failed", str(error) if named else f"{type(error).__name__}: {error}")
                callback.end("failed", {})
            raise
    finally:
        recorder.close()


def check_folder(folder: Path, flat: Flat) -> None:
    """Raise ConfigError for a folder with a run that is not to be resumed, or with one of another configuration.

    `ssfl run` has checked this already, plain `flwr run` has not.
    """
    path = folder / "config.toml"
    if not path.exists():
        return
    if not path.is_file():  # a pipe would be waited for, for ever
        raise ConfigError(f"run.out is {folder}; its config.toml is a regular file")
    if not flat["run.resume"]:
        raise ConfigError(f"run.out is {folder}; it holds a run already: go on with run.resume, or name another one")
    clash = first_clash(flat, read_file(path), whole=True)
    if clash is not None:
        raise ConfigError(f"run.out is {folder}; {clash}")


def check_frozen(strategy: SparseStrategy, initial: State) -> None:
    """Raise ConfigError if the frozen weights of a run that goes on are not those that it would start from today."""
    layout, dead = strategy.layout, ~strategy.mask.transmitted
    if not np.array_equal(layout.flatten(strategy.state)[dead], layout.flatten(initial)[dead]):
        raise ConfigError(
            "run.resume is true; the frozen weights of its checkpoint are not the initial ones: model.weights is the "
            "file that the run was started with"
        )


def privacy_ledger(config: Config, folder: Path) -> Ledger | None:
    """Return what a run with privacy.level "client" spends and may spend; None for others. Nothing is written.

    Raises
    ------
    ConfigError
        Budget, noise and rounds do not fit; of a run that goes on, the ledger is missing, damaged or another's.
    """
    settings = config.settings
    run, privacy = settings.run, settings.privacy
    if privacy.level != "client":
        return None
    share = run.cohort / run.clients
    searches = REGISTRY[config.strategy].private_discoveries(settings)
    plan = Plan(run.rounds, share, privacy.discovery_multiplier if searches else 0.0, max(1, searches))
    fewest = LEAST_NEIGHBOURS + 1
    failure = failure_chance(run.clients, share, fewest, run.rounds) if privacy.secure_aggregation else 0.0
    make = Ledger.resume if run.resume and (folder / "config.toml").exists() else Ledger.start
    return make(folder, plan, budget(privacy, plan, failure))


def server_context(
    grid: Grid, runtime: Runtime, callback: "RecordingCallback", ledger: Ledger | None
) -> ServerContext:
    """Return what the strategy of a run works with; nothing is written."""
    run_folder = callback.recorder.folder
    simulated, replay = is_simulation(grid), runtime.config.settings.run.replay
    check_time(runtime.config, simulated)
    # Its clients share this machine; elsewhere each keeps its own in Flower's state.
    return ServerContext(
        runtime.layout,
        runtime.config.settings,
        workbench=runtime.model,
        input_shape=runtime.data.shape,
        callback=callback,
        folder=run_folder / "clients" if simulated else None,
        token=None if simulated else run_token(run_folder),
        dealt=None if runtime.own else functools.cache(runtime.holding),
        metric=callback.recorder.metric,
        ledger=ledger,
        tokens=not runtime.data.numbers,
        replay=taken_replies(Path(replay), runtime.config.flat) if replay else None,
    )


def taken_replies(folder: Path, flat: Flat) -> dict[int, Taken]:
    """Return whose replies the run in a folder took, by round, for another run of the same configuration.

    Raises
    ------
    ConfigError
        It is another run, has fewer rounds, or lost answers in discovery, of which its record does not say enough.
    """
    run = read_run(folder)
    clash = first_clash({key: value for key, value in flat.items() if key != "run.replay"}, run.config)
    if clash is not None:
        raise ConfigError(f"run.replay is {folder}; {clash}")
    for entry in [run.setup or {}, *run.rounds]:
        for kind in ("lost", "refused"):
            gone = entry.get(f"setup_{kind}") or (entry.get(kind) if entry is run.setup else None)
            if gone:
                where = f"in discovery at round {entry['round']}"
                raise ConfigError(f"run.replay is {folder}; clients {sorted(gone, key=int)} were {kind} {where}")
    wanted = int(flat["run.rounds"])
    if len(run.rounds) < wanted and not any("stopped" in entry for entry in run.rounds):
        raise ConfigError(f"run.replay is {folder}; it has {len(run.rounds)} rounds of run.rounds, {wanted}")
    return {
        entry["round"]: Taken(
            frozenset(map(int, entry.get("ok", ()))),
            frozenset(map(int, entry.get("busy", ()))),
            {int(client): age for client, age in entry.get("stale", {}).items()},
        )
        for entry in run.rounds
    }


def conduct(grid: Grid, runtime: Runtime, callback: "RecordingCallback", strategy: SparseStrategy) -> Record:
    """Play a run, new or resumed, from the handshake to the report; return its summary."""
    config, run, recorder = runtime.config, runtime.config.settings.run, callback.recorder
    registry = strategy.messenger.registry
    registry.say, registry.misfit = recorder.say, functools.partial(misfit, runtime)
    if strategy.context.token is not None:
        write_bytes(token_path(recorder.folder), f"{strategy.context.token}\n".encode())
        strategy.messenger.keep_exchange(token_path(recorder.folder).with_name("exchange"))
        registry.bound = functools.partial(bound_places, runtime.own)
    # Not kept in a variable: the initial weights would stay in memory for the whole run.
    # A run that stopped early is over when it is resumed, too.
    rounds = recorder.records[-1]["round"] if callback.stopped() else run.rounds
    strategy.start(grid, ArrayRecord(runtime.initial_state()), rounds, evaluate_fn=central_evaluation(runtime))
    callback.accuracies()
    metadata: Record = {
        "strategy": config.strategy,
        "dataset": config.data.name,
        "partition": "sites" if runtime.own else config.partition.name,
        "model": config.model.name,
        "clients": run.clients,
        "cohort": run.cohort,
        # A cohort of differential privacy is secret, and drawn anew whenever it is asked for.
        "trained_clients": run.cohort if strategy.ledger is not None else len(strategy.cohort(1)),
        "rounds": recorder.records[-1]["round"],
        "seed": run.seed,
        "engine": engine_name(grid),
        **described(runtime.data),
        **callback.outcome(),
        **spent(strategy),
        **narrower(runtime.layout, strategy.layout),
    }
    summary = recorder.finish(metadata, runtime.layout, strategy.layout, strategy.model(), strategy.mask)
    if why := undone(lambda: write_report([read_run(recorder.folder)], recorder.folder / "report.html")):
        cure = command("ssfl", "report", recorder.folder)
        recorder.say(f"warning: report.html could not be made ({why}); to try again: {cure}")
    recorder.say(summary_table(summary, recorder.folder, recorder.metric).text())
    return summary


def spent(strategy: SparseStrategy) -> Record:
    """Return what the summary has of differential privacy."""
    privacy, ledger = strategy.settings.privacy, strategy.ledger
    if not privacy.private:
        return {}
    noise = {} if ledger is None else {"noise_multiplier": ledger.budget.noise_multiplier}
    return {"privacy_level": privacy.level, "epsilon": strategy.epsilon, "delta": privacy.delta, **noise}


def narrower(whole: Layout, layout: Layout) -> Record:
    """Return what the summary has of a network with fewer inner channels than the whole one."""
    if layout == whole:
        return {}
    return {"widths": {inner.name: inner.size for inner in layout.inner}, "parameters_kept": layout.size}


def run_token(folder: Path) -> str:
    """Return what real clients call this run in the names of files: drawn at its start, the same on resuming."""
    path = token_path(folder)
    with contextlib.suppress(OSError, ValueError):
        check_regular(path)
        if re.fullmatch("[0-9a-f]{16}", token := path.read_text("utf-8").strip()):
            return token
    return secrets.token_hex(8)


def token_path(folder: Path) -> Path:
    """Return where a run keeps its token."""
    return folder / "checkpoint" / "token"


def site_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the sites of the run in a folder, by client; ConfigError if clients.json does not tell."""
    path = folder / "clients.json"
    try:
        check_regular(path)
        rows = json.loads(path.read_bytes())["clients"]
        return tuple(str(row["name"]) for row in sorted(rows, key=lambda row: int(row["client"])))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} does not tell the names of the sites ({error!r}); a run goes on by it") from error


def engine_name(grid: Grid) -> str:
    """Return inline, ray or deployment."""
    if getattr(grid, "in_process", False):
        return "inline"
    return "ray" if is_simulation(grid) else "deployment"


def ease_simulation(grid: Grid) -> None:
    """Have Flower's simulation not look through all messages for each node, if this version of it is known."""
    from ssfl_app.comm import flower_patches

    if flower_patches.known():
        flower_patches.mailboxes(cast(Any, grid).state)


def central_evaluation(runtime: Runtime) -> Callable[[int, ArrayRecord], MetricRecord] | None:
    """Return Flower's evaluate_fn, loss and metric of the global model on the whole test set; None without one.

    Where data stream, it is the part of the test set that is in play.
    """
    if not len(runtime.data.test):
        return None

    def evaluate(round_: int, arrays: ArrayRecord) -> MetricRecord:
        model = runtime.load({n: torch.from_numpy(a.numpy()) for n, a in arrays.items()})
        loss, accuracy = runtime.trainer.evaluate(model, runtime.central_test(round_))
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    return evaluate


class RecordingCallback(RunCallback):
    """Sees the run go by, has it recorded, tells the trackers, and knows when it is to stop early."""

    def __init__(self, recorder: Recorder, runtime: Runtime, trackers: Mapping[str, RunCallback]) -> None:
        self.recorder = recorder
        self.runtime = runtime
        self._sites: dict[int, Metadata] = {}
        self.ledger: Ledger | None = None
        self._trackers, self._failed = dict(trackers), dict[str, str]()
        self._options, self._metric = runtime.config.settings.stop, runtime.trainer.task.metric
        # Without a global model, what a strategy would write is a mean that nobody uses.
        self._keeps = self._options.keep_best and REGISTRY[runtime.config.strategy].has_global_model

    def start(self, strategy: SparseStrategy, next_round: int) -> None:
        """Let the trackers begin; write the best model again if the run was killed before it was written."""
        best = progress(self.recorder.records, self._options, self._metric).best
        if self._keeps and best and best == next_round - 1:
            self._keep(strategy)
        self._tell("begin", RunInfo(self.recorder.folder, self.runtime.config.flat, self._metric, next_round))

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        """Let the trackers end."""
        self._tell("end", status, summary)

    def stopped(self) -> str:
        """Return why the run ended before its last round; "" if it did not."""
        return str(self.recorder.records[-1].get("stopped", "")) if self.recorder.records else ""

    def outcome(self) -> Record:
        """Return what the summary has of early stopping, the best round and trackers that failed; say it, too."""
        records, options, metric = self.recorder.records, self._options, self._metric
        failed = {name: why for record in records for name, why in record.get("failed_trackers", {}).items()}
        found: Record = {"failed_trackers": failed} if failed else {}
        if why := self.stopped():
            found["stopped"] = why
            self.recorder.say(f"stopped after round {records[-1]['round']}: {why}")
        now = progress(records, options, metric)
        if (options.keep_best or options.patience) and now.best:
            found |= {"best_round": now.best, "best_value": now.value}
            kept = ": best.safetensors" if self._keeps else ""
            if options.keep_best and not self._keeps:
                kept = f"; no best.safetensors: {self.runtime.config.strategy} has no global model"
            self.recorder.say(
                f"best: round {now.best}, {metric.name} {metric.scale * now.value:.4g}{metric.unit}{kept}"
            )
        return found

    def _keep(self, strategy: SparseStrategy) -> None:
        model = strategy.layout, strategy.model(), strategy.mask
        self.recorder.model(*model, "best.safetensors", "best-mask.safetensors")

    def _tell(self, method: str, *arguments: Any) -> str:
        """Have all trackers see something; return why they end the run. One that fails is told nothing more."""
        reasons = []
        for name, tracker in list(self._trackers.items()):
            try:
                reasons.append(getattr(tracker, method)(*arguments))
            except Exception as error:
                del self._trackers[name]
                self._failed[name] = f"{type(error).__name__}: {error}"
                self.recorder.say(f"warning: {name} of run.trackers gets nothing more: {self._failed[name]}")
        return "; ".join(str(why) for why in reasons if why)

    def met(self, sites: Mapping[int, Metadata]) -> None:
        """Name devices, and describe the run in a few lines."""
        self._sites = dict(sites)
        self.recorder.names = {client: str(told["name"]) for client, told in sites.items() if "name" in told}
        config, data = self.runtime.config, self.runtime.data
        devices = ", ".join(sorted({str(metadata.get("device", "unknown device")) for metadata in sites.values()}))
        dealt = "own data" if self.runtime.own else f"{config.partition.name} partition"
        task = data.task if config.task.name == AUTO else config.task.name
        self.recorder.say(
            f"{config.strategy} on {data.name} ({task}): {len(sites)} clients on {devices}, {dealt}, "
            f"{config.model.name} with {self.runtime.layout.size:,} parameters, augmentation {data.transform.augment}"
        )
        for note in data.notes:
            self.recorder.say(f"note: {note}")
        if any(metadata.get("gpu-is-hidden") for metadata in sites.values()):
            self.recorder.say(
                "note: this machine has a GPU, but Flower hides it from the clients (num-gpus 0): they train "
                "on the CPU. `ssfl run` gives it to them; with `flwr run` set client-resources-num-gpus"
            )
        if config.settings.privacy.secure_aggregation:
            self.recorder.say(
                "secure aggregation: answers are masked; without pins at the nodes this protects against an "
                "honest-but-curious server (docs/privacy.md)"
            )
        if self.ledger is not None:
            plan, paid = self.ledger.plan, self.ledger.budget
            self.recorder.say(
                f"differential privacy of clients: noise multiplier {paid.noise_multiplier:g}, clip "
                f"{config.settings.privacy.clip:g}; {plan.rounds} rounds cost epsilon {paid.epsilon:.4g} at delta "
                f"{config.settings.privacy.delta:g}, and {self.ledger.epsilon:.4g} is spent"
            )
        self._write_clients({})
        self._tell("met", sites)

    def warn(self, line: str) -> None:
        """Tell people."""
        self.recorder.say(f"warning: {line}")
        self._tell("warn", line)

    def round(self, record: Record, strategy: SparseStrategy) -> str:
        """Record a round; take a checkpoint when one is due; return why the run is to end now."""
        run, round_ = self.runtime.config.settings.run, record["round"]
        now = progress([*self.recorder.records, record], self._options, self._metric)
        why = self._tell("round", record, strategy)
        if 0 < self._options.patience <= now.since:
            why = f"no better {self._metric.name} in {now.since} evaluated rounds"
        record |= {"stopped": why} if why and 0 < round_ < run.rounds else {}
        if self._failed:
            record, self._failed = record | {"failed_trackers": self._failed}, {}
        self.recorder.round(record)
        best = self._keeps and now.best == round_ > 0
        if round_ % run.checkpoint_every == 0 or round_ == run.rounds or "stopped" in record or best:
            self.recorder.checkpoint(round_, strategy.state_dict())
        if best:  # after the checkpoint: the file and what a resumed run knows of it agree
            self._keep(strategy)
        return str(record.get("stopped", ""))

    def accuracies(self) -> None:
        """Add the last known accuracy of every client to clients.json."""
        known: dict[str, dict[str, float]] = {"accuracy": {}, "personal_accuracy": {}}
        for record in self.recorder.records:
            known["accuracy"] |= record.get("local_accuracy", {})
            known["personal_accuracy"] |= record.get("personal_accuracy", {})
        self._write_clients(known)

    def _write_clients(self, known: Mapping[str, Mapping[str, float]]) -> None:
        runtime, clients = self.runtime, []
        for client in range(runtime.config.settings.run.clients):
            metadata = self._sites.get(client, {})
            held = read_data_summary(metadata) if runtime.own else runtime.holding(client)
            row: dict[str, Any] = {"client": client}
            row |= {"name": str(metadata["name"])} if "name" in metadata else {}
            row |= {"key": fingerprint(key)} if isinstance(key := metadata.get(KEY), bytes) else {}
            row |= {"train": list(held.counts), "test_images": held.test_images}
            row |= {name: known.get(name, {}).get(str(client)) for name in ("accuracy", "personal_accuracy")}
            clients.append(row)
        names = list(runtime.data.class_names)
        write_json(self.recorder.folder / "clients.json", {"class_names": names, "clients": clients})


def misfit(runtime: Runtime, hello: Handshake) -> str | None:
    """Return why a node cannot be in this run whatever its place, and the cure; None if it can.

    It runs other code than the server, starts from other weights where that matters, or holds images of other classes
    or another shape; or its copy of a shared data set is another one.
    """
    metadata, who = hello.metadata, hello.name or f"client {hello.number}"
    code = code_digest(runtime.modules)
    if metadata.get("code") != code:
        return (
            f"runs other code ({metadata.get('code')!r}) than the server ({code!r}): install the same "
            "version on both, or start Flower's SuperLink from another folder"
        )
    if metadata.get("weights", "") != runtime.start_digest:
        return (
            "starts from other weights than the server, which has their digest compared: model.weights is the same "
            "file on both, or empty where both draw the same numbers from run.seed"
        )
    number = hello.number or 0
    if not runtime.own and number >= runtime.config.settings.run.clients:
        return None  # no place, whatever it holds
    try:
        held = read_data_summary(metadata)
    except PayloadError as error:
        return str(error)
    dealt = runtime.holding(number)
    return mismatch(who, held, "the server", dealt) or (None if runtime.own else other_images(who, held, dealt))


def bound_places(own: bool) -> dict[Claim, int]:
    """Return the places that are bound to nodes' keys, and to which node; empty outside `ssfl federation`.

    Where each site has its `own` data places are names, else numbers. A damaged file raises RunFailed.
    """
    path = os.environ.get(locks.REGISTERED, "")
    if not path or not Path(path).exists():
        return {}
    try:
        content = json.loads(Path(path).read_bytes())
        if own:
            return {str(name): int(node) for name, node in content["names"].items()}
        return {int(number): int(node) for number, node in content["numbers"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFailed(f"{path} is damaged; ssfl federation register writes it anew") from error
