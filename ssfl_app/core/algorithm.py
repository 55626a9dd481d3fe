"""The parts of an algorithm that its file imports: the two base classes, and what their methods take and return."""

from ssfl_app.comm.messenger import Reply
from ssfl_app.comm.payload import Metadata, Payload, shared_buffers
from ssfl_app.core.client import ClientAlgorithm, Need
from ssfl_app.core.rounds import Query
from ssfl_app.core.strategy import ServerContext, SparseStrategy
from ssfl_app.data.dataset import Samples

__all__ = ["ClientAlgorithm", "Need", "Query", "ServerContext", "SparseStrategy"]
__all__ += ["Samples", "Metadata", "Payload", "Reply", "shared_buffers"]
