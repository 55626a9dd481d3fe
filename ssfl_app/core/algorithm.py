"""What an algorithm's file is written with, beside masks, training and the folds: one place to import it from."""

from ssfl_app.comm.messenger import Reply
from ssfl_app.comm.payload import Metadata, Payload, shared_buffers
from ssfl_app.core.client import ClientAlgorithm, Need
from ssfl_app.core.options import FromSettings, MaskOptions, Section, Settings
from ssfl_app.core.rounds import Query
from ssfl_app.core.strategy import ServerContext, SparseStrategy, density_pair
from ssfl_app.core.validation import check_number, stored
from ssfl_app.data.dataset import Images
from ssfl_app.options import ConfigError, above, anything, at_least, choice, fraction, option

__all__ = [
    "ClientAlgorithm",
    "ConfigError",
    "FromSettings",
    "Images",
    "MaskOptions",
    "Metadata",
    "Need",
    "Payload",
    "Query",
    "Reply",
    "Section",
    "ServerContext",
    "Settings",
    "SparseStrategy",
    "above",
    "anything",
    "at_least",
    "check_number",
    "choice",
    "density_pair",
    "fraction",
    "option",
    "shared_buffers",
    "stored",
]
