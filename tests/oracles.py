"""Methods as their papers write them: one process, plain tensors, no Flower, codec, mask class or stream.

They share with the package the data, the initial weights and the addresses of random numbers, and nothing of what
they check: the loop, the scores, the ranking, the masking and the averages are written again, the slow obvious way.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ssfl_app.runtime import Runtime
from ssfl_app.seeding import generator
from ssfl_app.sparsity.saliency import balanced_batch
from ssfl_app.training import models

State = dict[str, torch.Tensor]


def initial_weights(runtime: Runtime) -> State:
    """Return w0."""
    config, shape = runtime.config, runtime.data.shape
    model = models.create(config.model, shape, runtime.data.classes, config.settings.run.seed)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def saliency_mask(runtime: Runtime, w0: State) -> State:
    """SSFL, algorithm 1, first phase: s = sum_k p_k |g_k * w0|, keep the global top."""
    config = runtime.config
    options, run = config.settings.sections["ssfl"], config.settings.run
    model, data = runtime.model, runtime.data.train
    weights = [n for n, t in w0.items() if t.ndim > 1]
    total = sum(len(part) for part in runtime.partition.train)
    mean = {name: torch.zeros_like(w0[name], dtype=torch.float64) for name in weights}
    for client, part in enumerate(runtime.partition.train):
        rng = generator(run.seed, "saliency", client, 0)
        chosen = part[balanced_batch(data.labels.numpy()[part], options.saliency_batch_size, rng)]
        model.load_state_dict(w0)
        model.zero_grad()
        inputs = runtime.data.transform.test(data.inputs[chosen])
        functional.cross_entropy(model(inputs), data.labels[chosen]).backward()
        for name, parameter in model.named_parameters():
            if name in mean:
                mean[name] += (len(part) / total) * (parameter.grad * w0[name]).abs().double()
    scores = np.concatenate([mean[name].float().numpy().ravel() for name in weights])
    keep = int(config.settings.mask.density * scores.size)
    alive = np.zeros(scores.size, dtype=bool)
    alive[np.argsort(-scores, kind="stable")[:keep]] = True
    mask, start = {}, 0
    for name in weights:
        size = w0[name].numel()
        mask[name] = torch.from_numpy(alive[start : start + size].copy()).view_as(w0[name])
        start += size
    return mask


def mask_in_steps(runtime: Runtime, w0: State, steps: int, returning: bool) -> State:
    """Iterative SNIP, or FORCE if weights may return, of the first client alone; with one step both are SNIP.

    De Jorge et al., ICLR 2021: in step t of T the floor(P d^(t / T)) largest |g w0| stay, with g of the masked net.
    """
    config, model, data = runtime.config, runtime.model, runtime.data.train
    names, part = [n for n, t in w0.items() if t.ndim > 1], runtime.partition.train[0]
    mask = {name: torch.ones_like(w0[name]) for name in names}
    for step in range(steps):
        rng = generator(config.settings.run.seed, "saliency", 0, step)
        batch_size = config.settings.sections["ssfl"].saliency_batch_size
        chosen = part[balanced_batch(data.labels.numpy()[part], batch_size, rng)]
        model.load_state_dict({name: t * mask[name] if name in mask else t for name, t in w0.items()})
        model.zero_grad()
        functional.cross_entropy(
            model(runtime.data.transform.test(data.inputs[chosen])), data.labels[chosen]
        ).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        scored = []  # (score, tensor, place) of all candidates
        for number, name in enumerate(names):
            scores, alive = (gradients[name] * w0[name]).abs().flatten().tolist(), mask[name].flatten().tolist()
            scored += [(-s, number, i) for i, (s, a) in enumerate(zip(scores, alive, strict=True)) if a or returning]
        size = sum(w0[name].numel() for name in names)
        kept = sorted(scored)[: int(size * config.settings.mask.density ** ((step + 1) / steps))]
        mask = {name: torch.zeros_like(w0[name]) for name in names}
        for _, number, place in kept:
            mask[names[number]].view(-1)[place] = 1
    return mask


def train_locally(
    runtime: Runtime,
    w: State,
    mask: State,
    round_: int,
    client: int,
    epochs: int | None = None,
    purpose: str = "train",
    pull: float = 0.0,
    towards: State | None = None,
    term: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None,
    shift: State | None = None,
) -> State:
    """One client's epochs of clipped SGD with weight decay; dead weights get no gradient.

    With a pull (Ditto), v <- v - lr * pull * (v - towards) after every step. A term of model and inputs is added to
    the loss (FedProx, MOON), a shift to the clipped gradient (SCAFFOLD).
    """
    options, run = runtime.config.settings.local, runtime.config.settings.run
    model, data = runtime.model, runtime.data.train.take(runtime.partition.train[client])
    model.load_state_dict(w)
    model.train()
    lr = options.lr * options.lr_decay ** (round_ - 1)
    rng = generator(run.seed, purpose, round_, client)
    for _ in range(epochs or options.epochs):
        order = rng.permutation(len(data))
        for start in range(0, len(data), options.batch_size):
            batch = order[start : start + options.batch_size]
            model.zero_grad()
            inputs = runtime.data.transform.train(data.inputs[batch], rng)
            loss = functional.cross_entropy(model(inputs), data.labels[batch])
            (loss if term is None else loss + term(model, inputs)).backward()
            with torch.no_grad():
                gradients = {n: p.grad * mask[n] if n in mask else p.grad for n, p in model.named_parameters()}
                norm = torch.sqrt(sum((g.double() ** 2).sum() for g in gradients.values()))
                scale = min(1.0, options.clip / (float(norm) + 1e-6))
                for name, parameter in model.named_parameters():
                    # w - lr (g + decay w), by the operations that torch fuses: on a CPU with AVX2 and no AVX-512 a
                    # product that is rounded before it is added has another last bit, and in a round 1e-3 come of it.
                    step = gradients[name] * scale
                    if shift is not None:
                        step += shift[name]
                    step.add_(parameter, alpha=options.weight_decay)
                    parameter.add_(step, alpha=-lr)
                    if towards is not None:
                        parameter.sub_(parameter - towards[name], alpha=lr * pull)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def mean_of(runtime: Runtime, cohort: list[int], trained: list[State]) -> State:
    """sum_k n_k t_k / sum_k n_k over the clients of a cohort."""
    shares = [len(runtime.partition.train[client]) for client in cohort]
    means = {name: sum(n * t[name].double() for n, t in zip(shares, trained, strict=True)) for name in trained[0]}
    return {name: (mean / sum(shares)).float() for name, mean in means.items()}


def one_round(
    runtime: Runtime, w: State, mask: State, round_: int, cohort: list[int], epochs: int | None = None
) -> State:
    """FedAvg inside a mask (all of the weights if it is empty): w = sum_k n_k w_k / sum_k n_k."""
    w = {name: tensor * mask[name] if name in mask else tensor for name, tensor in w.items()}
    trained = [train_locally(runtime, w, mask, round_, client, epochs) for client in cohort]
    return mean_of(runtime, cohort, trained)


def feddst_merged(
    models: list[State], masks: list[State], samples: list[int], alive: dict[str, int]
) -> tuple[State, State]:
    """FedDST: sum_k n_k m_k w_k / sum_k n_k m_k, of which the largest of each layer stay; that model and its mask."""
    merged, mask = {}, {}
    for name in masks[0]:
        total = sum(n * w[name].double() * m[name] for n, w, m in zip(samples, models, masks, strict=True))
        owned = sum(n * m[name].double() for n, m in zip(samples, masks, strict=True))
        mean = torch.where(owned > 0, total / owned, 0.0).float()
        order = np.argsort(-mean.abs().numpy().ravel(), kind="stable")
        mask[name] = torch.zeros_like(mean)
        mask[name].view(-1)[order[: alive[name]]] = 1
        merged[name] = mean * mask[name]
    for name in models[0].keys() - masks[0].keys():
        merged[name] = (
            sum(n * w[name].double() for n, w in zip(samples, models, strict=True)) / sum(samples)
        ).float()
    return merged, mask


def spafl_moved(w: State, change: State) -> State:
    """SpaFL: each filter against the change of its threshold, w_ij - sign(sum_j w_ij) change_i / n."""
    moved = {name: tensor.clone() for name, tensor in w.items()}
    for name, by in change.items():
        size = w[name][0].numel() if w[name].ndim == 2 else w[name][0, 0].numel()
        for i, filter_ in enumerate(moved[name]):
            filter_ -= torch.sign(filter_.sum()) * by[i] / size
    return moved


def spafl_trained(runtime: Runtime, w: State, tau: State, round_: int, client: int) -> tuple[State, State]:
    """SpaFL: one client's epochs on weights and thresholds together, gradients written out."""
    settings = runtime.config.settings
    options, alpha = settings.local, settings.sections["spafl"].penalty
    model, data = runtime.model, runtime.data.train.take(runtime.partition.train[client])
    w = {name: tensor.clone() for name, tensor in w.items()}
    tau = {name: tensor.clone() for name, tensor in tau.items()}

    def bits(name: str) -> torch.Tensor:
        means = torch.stack([filter_.abs().mean() for filter_ in w[name]])
        return (means > tau[name]).float()

    def restart() -> None:
        for name in tau:
            if bits(name).mean() <= 0.01:
                tau[name].zero_()

    rng, lr = generator(settings.run.seed, "train", round_, client), options.rate(round_)
    restart()
    for _ in range(options.epochs):
        order = rng.permutation(len(data))
        for start in range(0, len(data), options.batch_size):
            batch = order[start : start + options.batch_size]
            alive = {name: bits(name).view(-1, *[1] * (w[name].ndim - 1)) for name in tau}
            model.load_state_dict({name: t * alive[name] if name in tau else t for name, t in w.items()})
            model.train()
            model.zero_grad()
            inputs = runtime.data.transform.train(data.inputs[batch], rng)
            functional.cross_entropy(model(inputs), data.labels[batch]).backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
            of_tau = {}
            for name in tau:
                dv, one = gradients[name], [1] * (w[name].ndim - 1)
                s = (w[name] * dv).flatten(1).sum(dim=1)
                of_tau[name] = -s - alpha * torch.exp(-tau[name])
                gradients[name] = alive[name] * dv + w[name].sign() * (s / w[name][0].numel()).view(-1, *one)
            norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in [*gradients.values(), *of_tau.values()]))
            scale = min(1.0, options.clip / (norm + 1e-6))
            for values, slopes in ((w, gradients), (tau, of_tau)):
                for name, slope in slopes.items():
                    values[name] -= lr * (slope * scale + options.weight_decay * values[name])
            restart()
    return w, tau


def ditto_personal(runtime: Runtime, v: State, w: State, round_: int, client: int) -> State:
    """Ditto, algorithm 1: a sampled client's own model, pulled towards the w that came down."""
    options = runtime.config.settings.sections["ditto"]
    return train_locally(
        runtime, v, {}, round_, client, options.personal_epochs, "personal", pull=options.pull, towards=w
    )


def dispfl_first_mask(runtime: Runtime, client: int, w0: State) -> State:
    """DisPFL: a random mask with Erdos-Renyi-Kernel densities, eps * sum(shape) / prod(shape), at most 1."""
    config = runtime.config
    shapes = {name: tuple(t.shape) for name, t in w0.items() if t.ndim > 1}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    alive = int(config.settings.mask.density * sum(sizes.values()))
    dense: set[str] = set()
    while True:
        rest = [name for name in shapes if name not in dense]
        eps = (alive - sum(sizes[name] for name in dense)) / sum(sum(shapes[name]) for name in rest)
        full = [name for name in rest if eps * sum(shapes[name]) > sizes[name]]
        if not full:
            break
        dense |= {max(full, key=lambda name: sum(shapes[name]) / sizes[name])}
    rng, mask = generator(config.settings.run.seed, "dispfl-mask", client), {}
    for name, size in sizes.items():
        count = size if name in dense else int(eps * sum(shapes[name]))
        bits = np.zeros(size, dtype=bool)
        bits[rng.choice(np.arange(size), count, replace=False, shuffle=False)] = True
        mask[name] = torch.from_numpy(bits).view(shapes[name])
    return mask


def dispfl_neighbours(runtime: Runtime, round_: int, client: int) -> list[int]:
    """DisPFL: as many random others as gossip.neighbours says."""
    run, options = runtime.config.settings.run, runtime.config.settings.sections["gossip"]
    others = [other for other in range(run.clients) if other != client]
    order = generator(run.seed, "gossip", round_, client).permutation(others)
    return [int(other) for other in order[: options.neighbours]]


def mean_over_owners(models: list[State], masks: list[State]) -> State:
    """sum_j w_j / sum_j m_j, 0 where no mask has the weight; everything else is the plain mean."""
    mean = {}
    for name in models[0]:
        total, owners = torch.zeros_like(models[0][name], dtype=torch.float64), torch.zeros_like(models[0][name])
        for model, mask in zip(models, masks, strict=True):
            bits = mask[name].float() if name in mask else torch.ones_like(model[name])
            total += model[name].double() * bits
            owners += bits
        mean[name] = torch.where(owners > 0, total / owners, 0.0).float()
    return mean


def dispfl_next_mask(runtime: Runtime, w: State, mask: State, round_: int, client: int) -> State:
    """DisPFL: the smallest alive weights of each layer die, as many dead ones come alive."""
    settings, data = runtime.config.settings, runtime.data.train.take(runtime.partition.train[client])
    drop = 0.5 / 2 * (1 + math.cos(math.pi * (round_ - 1) / settings.run.rounds))
    rng = generator(settings.run.seed, "regrow", round_, client)
    gradients: State = {}
    if settings.sections["dispfl"].regrow == "gradient":
        batch = rng.choice(len(data), min(settings.local.batch_size, len(data)), replace=False)
        model = runtime.model
        model.load_state_dict(w)
        model.zero_grad()
        inputs = runtime.data.transform.test(data.inputs[batch])
        functional.cross_entropy(model(inputs), data.labels[batch]).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    moved = {}
    for name, bits in mask.items():
        alive = bits.numpy().ravel().copy()
        places = np.flatnonzero(alive)
        count = math.ceil(drop * places.size)
        size = w[name].abs().numpy().ravel()[places]
        alive[places[np.lexsort((-places, size))[:count]]] = False
        dead = np.flatnonzero(~alive)
        if gradients:
            steep = gradients[name].abs().numpy().ravel()[dead]
            born = dead[np.argsort(-steep, kind="stable")[:count]]
        else:
            born = rng.choice(dead, count, replace=False, shuffle=False)
        alive[born] = True
        moved[name] = torch.from_numpy(alive).view_as(bits)
    return moved
