"""Flower's client door: a NumPyClient, served through the Message API.

`SparseClient` speaks NumPy: arrays in, arrays out. In a training round of SSFL these arrays are the alive values and
nothing else. `serve` is the adapter that lets strategies of the Message API drive such a client.
"""

from pathlib import Path
from typing import Any

import numpy.typing as npt
from flwr.app import Context, Message
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp

from ssfl_app.strategies import REGISTRY
from ssfl_app.strategies.post import FOLDER
from ssfl_app.strategies.rule import ClientRule, Need
from ssfl_app.wire import Memory, Packer, Parcel, read_record
from ssfl_app.workshop import code_digest, gpu_is_hidden, open_workshop

NDArrays = list[npt.NDArray[Any]]


class SparseClient(NumPyClient):
    """One client's half of a strategy behind Flower's NumPyClient interface.

    Parameters
    ----------
    rule : ClientRule
        The algorithm, at this client's site.

    Notes
    -----
    ``config["arrays"]`` names the arrays in order, e.g. "values,mask"; so does the returned metric "arrays".
    """

    def __init__(self, rule: ClientRule) -> None:
        self.rule = rule

    def get_properties(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return who this client is and what it works with."""
        site = self.rule.site
        return {
            "client": site.number,
            "samples": len(site.share[0]),
            "test-samples": len(site.share[1]),
            "device": str(site.trainer.device),
            "gpu-is-hidden": gpu_is_hidden(),
            "code": code_digest(),
        }

    def fit(self, parameters: NDArrays, config: dict[str, Any]) -> tuple[NDArrays, int, dict[str, Any]]:
        """Train, or answer ``config["question"]``; return arrays, samples and facts."""
        parcel, trainer = _parcel(parameters, config), self.rule.site.trainer
        passes, looks = trainer.passes, trainer.looks
        try:
            question = config.get("question")
            reply = self.rule.train(parcel) if question is None else self.rule.setup(question, parcel)
        except Need as need:
            return [], 0, {"need": str(need)}
        work = {"passes": trainer.passes - passes, "looks": trainer.looks - looks}
        facts = {**reply.facts, **work, "arrays": ",".join(reply.arrays)}
        return list(reply.arrays.values()), int(reply.facts["samples"]), facts

    def evaluate(self, parameters: NDArrays, config: dict[str, Any]) -> tuple[float, int, dict[str, Any]]:
        """Test the model on this client's own test images; return loss, samples and facts."""
        passes = self.rule.site.trainer.passes
        try:
            facts = self.rule.evaluate(_parcel(parameters, config))
        except Need as need:
            return 0.0, 0, {"need": str(need)}
        facts["passes"] = self.rule.site.trainer.passes - passes  # of methods that fine-tune before they test
        return float(facts.get("loss", 0.0)), int(facts["samples"]), facts


def _parcel(parameters: NDArrays, config: dict[str, Any]) -> Parcel:
    names = [name for name in str(config.get("arrays", "")).split(",") if name]
    facts = {key: value for key, value in config.items() if key not in ("arrays", "question")}
    return Parcel(dict(zip(names, parameters, strict=True)), facts)


def serve(client: NumPyClient, message: Message) -> Message:
    """Answer a message of the Message API by a NumPyClient.

    ``query.hello`` asks for properties, ``query.<question>`` and ``train`` call `fit`, ``evaluate`` calls
    `evaluate`. The round and the digest go back as they came, so that the server can tell what was answered.
    """
    parcel = read_record(message.content)
    category, _, action = message.metadata.message_type.partition(".")
    config = {**parcel.facts, "arrays": ",".join(parcel.arrays)}
    arrays: NDArrays = []
    if action == "hello":
        facts = dict(client.get_properties(config))
    elif category == "evaluate":
        loss, samples, facts = client.evaluate(list(parcel.arrays.values()), config)
        facts = {"loss": loss, **facts, "samples": samples}
    else:
        question = {"question": action} if category == "query" else {}
        arrays, samples, facts = client.fit(list(parcel.arrays.values()), config | question)
        facts = {**facts, "samples": samples}
    names = [name for name in str(facts.pop("arrays", "")).split(",") if name]
    if "round" in parcel.facts:
        facts["round"] = parcel.facts["round"]
    reply = Parcel(dict(zip(names, arrays, strict=True)), facts)
    return Message(Packer().record(reply), reply_to=message)


def handle(message: Message, context: Context) -> Message:
    """Answer a message as the client that this node is."""
    workshop = open_workshop(dict(context.run_config))
    number = int(context.node_config["partition-id"])
    folder = read_record(message.content).facts.get(FOLDER)
    memory = Memory(context, number, Path(str(folder)) if folder else None)
    return serve(SparseClient(workshop.rule(number, memory)), message)


app = ClientApp()
app.train()(handle)
app.evaluate()(handle)
for _question in ("hello", *sorted({q for s in REGISTRY.values() for q in s.client.questions})):
    app.query(_question)(handle)
