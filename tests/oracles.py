"""SSFL and FedAvg as their papers write them: one process, plain tensors, no Flower, codec, mask class or stream.

They share with the package the data, the initial weights and the addresses of random numbers, and nothing of what
they check: the loop, the scores, the ranking, the masking and the averages are written again, the slow obvious way.
"""

import numpy as np
import torch
from torch.nn import functional

from ssfl_app.local import models
from ssfl_app.seeding import generator
from ssfl_app.sparsity.saliency import balanced_batch
from ssfl_app.workshop import Workshop

State = dict[str, torch.Tensor]


def initial_weights(workshop: Workshop) -> State:
    """Return w0."""
    config, shape = workshop.config, workshop.data.shape
    model = models.create(config.model, shape[0], workshop.data.classes, config.settings.run.seed)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def saliency_mask(workshop: Workshop, w0: State) -> State:
    """SSFL, algorithm 1, first phase: s = sum_k p_k |g_k * w0|, keep the global top."""
    config = workshop.config
    options, run = config.settings.own["ssfl"], config.settings.run
    model, data = workshop.model, workshop.data.train
    weights = [n for n, t in w0.items() if t.ndim > 1]
    total = sum(len(part) for part in workshop.partition.train)
    mean = {name: torch.zeros_like(w0[name], dtype=torch.float64) for name in weights}
    for client, part in enumerate(workshop.partition.train):
        rng = generator(run.seed, "saliency", client, 0)
        chosen = part[balanced_batch(data.labels.numpy()[part], options.saliency_batch_size, rng)]
        model.load_state_dict(w0)
        model.zero_grad()
        inputs = workshop.data.transform.test(data.pixels[chosen])
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


def train_locally(workshop: Workshop, w: State, mask: State, round_: int, client: int) -> State:
    """One client's epochs of clipped SGD with weight decay; dead weights get no gradient."""
    options, run = workshop.config.settings.local, workshop.config.settings.run
    model, data = workshop.model, workshop.data.train.take(workshop.partition.train[client])
    model.load_state_dict(w)
    model.train()
    lr = options.lr * options.lr_decay ** (round_ - 1)
    rng = generator(run.seed, "train", round_, client)
    for _ in range(options.epochs):
        order = rng.permutation(len(data))
        for start in range(0, len(data), options.batch_size):
            batch = order[start : start + options.batch_size]
            model.zero_grad()
            inputs = workshop.data.transform.train(data.pixels[batch], rng)
            functional.cross_entropy(model(inputs), data.labels[batch]).backward()
            with torch.no_grad():
                gradients = {n: p.grad * mask[n] if n in mask else p.grad for n, p in model.named_parameters()}
                norm = torch.sqrt(sum((g.double() ** 2).sum() for g in gradients.values()))
                scale = min(1.0, options.clip / (float(norm) + 1e-6))
                for name, parameter in model.named_parameters():
                    parameter -= lr * (gradients[name] * scale + options.weight_decay * parameter)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def one_round(workshop: Workshop, w: State, mask: State, round_: int, cohort: list[int]) -> State:
    """FedAvg inside a mask (all of the weights if it is empty): w = sum_k n_k w_k / sum_k n_k."""
    w = {name: tensor * mask[name] if name in mask else tensor for name, tensor in w.items()}
    trained = [train_locally(workshop, w, mask, round_, client) for client in cohort]
    shares = [len(workshop.partition.train[client]) for client in cohort]
    means = {name: sum(n * t[name].double() for n, t in zip(shares, trained, strict=True)) for name in w}
    return {name: (mean / sum(shares)).float() for name, mean in means.items()}
