"""Round 0: every client scores the weights once, and the mean of the scores becomes the mask."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from ssfl_app.guard import RunFailed
from ssfl_app.plugin.answer import Answer
from ssfl_app.plugin.folding import PositionalMean
from ssfl_app.plugin.inner import is_robust, scores_by
from ssfl_app.plugin.mail import Mail
from ssfl_app.sparsity.layout import Vector
from ssfl_app.sparsity.mask import Mask, Scope
from ssfl_app.wire import Facts


@dataclass(frozen=True)
class Discovery:
    """How the mask is found; the arguments of `SSFL` that concern nothing else."""

    density: float
    scope: Scope
    min_per_layer: int
    batches: int
    weighting: str
    share: float
    min_ok_fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}; it is a fraction in (0, 1]")
        if self.scope not in ("global", "layer"):
            raise ValueError(f"scope is {self.scope!r}; it is global or layer")
        if self.min_per_layer < 0:
            raise ValueError(f"min_per_layer is {self.min_per_layer}; it is at least 0")
        if self.batches < 1:
            raise ValueError(f"saliency_batches is {self.batches}; it is at least 1")
        if self.weighting not in ("samples", "uniform"):
            raise ValueError(f"saliency_weighting is {self.weighting!r}; it is samples or uniform")
        if not 0 < self.share <= 1:
            raise ValueError(f"saliency_share is {self.share}; it is a fraction in (0, 1]")

    def find(
        self,
        mail: Mail,
        grid: Grid,
        nodes: list[int],
        model: Vector,
        config: Mapping[str, Any],
        record: dict[str, Any],
        inner: FedAvg | None = None,
    ) -> Mask:
        """Ask the nodes for scores, and return the mask of the highest mean score (SSFL, eq. 6 and 7).

        With a robust inner strategy it folds the scores instead, which then wait for each other in memory.

        Parameters
        ----------
        model : array of float32, shape (layout.size,)
            The initial weights, which go to every node that is asked.
        record : dict
            Takes who answered, how, and what it cost.

        Raises
        ------
        RunFailed
            Too few nodes answered well, or no score is above 0.
        """
        layout = mail.sheet.layout
        mean, scored_by = PositionalMean(layout.prunable_size, len(nodes)), Counter[str]()
        answers: list[Answer] | None = [] if inner is not None and is_robust(inner) else None
        asked: Facts = {"batches": self.batches, "weighting": self.weighting}
        messages = mail.write("saliency", 0, nodes, model, config, asked)
        for answer in mail.open(mail.carry(grid, messages, 4 * layout.prunable_size)):
            if answers is None:
                mean.add(answer.values, answer.weight)
            else:
                answers.append(answer)
            scored_by[str(answer.facts["scored-by"])] += 1
            del answer
        record |= mail.names()
        record["scored_by"] = dict(sorted(scored_by.items()))
        record["bytes_discovery_down"] = mail.outcome.down + mail.outcome.mask_down
        record["bytes_discovery_up"] = mail.outcome.up
        mail.log_failures("discovery")
        mail.need(self.min_ok_fraction, "the question for saliency")
        scores, record["score_fold"] = np.zeros(layout.prunable_size, dtype=np.float32), "mean"
        if answers and inner is not None:
            scores, record["score_fold"] = scores_by(inner, answers, layout.prunable_size)
        elif mail.outcome.ok:
            scores = mean.value()
        if not scores.any():
            raise RunFailed("no client told a score above 0; the mask cannot be found")
        mask = Mask.top(layout, scores, self.density, self.scope, min_per_layer=self.min_per_layer)
        record |= {"density": mask.density, "layers": {name: alive / size for name, alive, size in mask.layers()}}
        return mask
