"""D-PSGD: every client trains, and mixes its model with those of a few neighbours; and D-PSGD-FT.

Lian, Zhang, Zhang, Hsieh, Zhang and Liu, "Can decentralized algorithms outperform centralized algorithms? A case
study for decentralized parallel stochastic gradient descent", NeurIPS 2017, algorithm 1; with local epochs in place
of one SGD step, as a baseline in the public code of DisPFL. In round r every client i

1. takes the uniform mean of its own and its neighbours' models of round r - 1 (section ``gossip``);
2. trains it for one local round; that is its model of round r.

The global accuracies are those of the consensus, the uniform mean of all models; the personal accuracy is that of the
client's own one. `dpsgd-ft` does the same, and after the last round every client fine-tunes the consensus for one
local round: then that is its personal accuracy.

Peers need no server; here it relays: it keeps every client's last model and sends each client the mean that this one
would take. On the wire that is one dense model down and one up a client and round, ``8 (P + R) K`` bytes together
with fp32. `peer_bytes` has what the peers themselves would pay, the models of all neighbours: ``4 (P + R) n K`` for
n neighbours each.

Departures: neighbours are drawn anew for each round and client (that code seeds with round + client, so client i + 1
draws what client i draws a round later); fine-tuning happens once, after the last round, at the rate of `finetune`
(there every 100 rounds, with round -1, so at lr * decay**-1); run.weighting changes nothing: by samples, mixing on a
ring would not keep the mean of all models. A client whose answer is lost takes part with the last model that the
server took. A lossy wire.up-values rounds a client's own model in its mean as well.
"""

from ssfl_app.core.aggregation import Aggregator
from ssfl_app.core.algorithm import Payload, shared_buffers
from ssfl_app.core.options import FromSettings
from ssfl_app.sparsity.layout import state_of
from ssfl_app.sparsity.values import Arrays
from ssfl_app.strategies.shared.fine_tuning import FineTuningClient, PersonalModelClient
from ssfl_app.strategies.shared.gossip import GossipOptions, PeerModelServer, neighbours


class DpsgdClient(PersonalModelClient):
    """Trains the mean that came down, and keeps its own model; tests the consensus beside it."""

    def train(self, payload: Payload) -> Payload:
        """Train the mean and return the client's model."""
        reply = super().train(payload)
        self.save_client_state(payload, {"model": self.context.layout.flatten(state_of(self.context.model))})
        return reply


class DpsgdFtClient(FineTuningClient, DpsgdClient):
    """The same, which in the end fine-tunes the consensus, and tests that in place of its own model."""


class Dpsgd(PeerModelServer):
    """The network of the peers."""

    name = "dpsgd"
    client = DpsgdClient
    gossip = FromSettings(GossipOptions)

    _mixed: tuple[int, list[int], Arrays] = (0, [], {})

    def train_payload(self, round_: int, client: int) -> Payload:
        """Return the mean of the client's and its neighbours' models; made once for clients with the same ones."""
        others = neighbours(self.settings, round_, client)
        self.peer_bytes += sum(Payload(self.last(other)).nbytes for other in others)
        group = sorted([client, *others])
        if self._mixed[:2] != (round_, group):
            state = self.layout.unflatten(self.mean(group))
            arrays = self.codec_down(round_).encode(self.layout, state, self.mask)
            self._mixed = (round_, group, shared_buffers(arrays))
        return Payload(self._mixed[2])

    def aggregator(self, round_: int) -> Aggregator:
        """Keep the models; the state becomes their mean."""
        self._mixed = (0, [], {})
        return super().aggregator(round_)

    def eval_payload(self, round_: int, client: int) -> Payload:
        """Return the consensus."""
        return super().train_payload(round_, client)


class DpsgdFt(Dpsgd):
    """The server does what D-PSGD's does."""

    name = "dpsgd-ft"
    client = DpsgdFtClient
