"""Scores |g * w|, and the balanced minibatch they are measured on."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssfl_app.data.dataset import Samples, Transform
from ssfl_app.sparsity.saliency import balanced_batch, plain_batch, snip
from ssfl_app.training.trainer import LocalOptions, LocalTrainer

law = settings(deadline=None, derandomize=True, max_examples=80)

OPTIONS = LocalOptions(epochs=1, batch_size=4, lr=0.1, lr_decay=1.0, momentum=0.0, weight_decay=0.0, clip=0.0)
TRAINER = LocalTrainer(OPTIONS, Transform((0.5,), (0.25,), "crop-flip"), torch.device("cpu"))


def images(count, side=4, seed=1):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, size=(count, 1, side, side), dtype=np.uint8)
    return Samples(torch.from_numpy(pixels), torch.from_numpy(np.arange(count) % 3))


def network(*extra):
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), *extra, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def test_the_score_is_the_magnitude_of_gradient_times_weight():
    gradient = {"w": torch.tensor([[2.0, -3.0], [0.0, -0.5]])}
    state = {"w": torch.tensor([[-1.0, -2.0], [9.0, 4.0]]), "b": torch.tensor([7.0])}
    scores = snip(gradient, state)
    assert list(scores) == ["w"]
    assert scores["w"].tolist() == [[2.0, 6.0], [0.0, 2.0]]


def test_the_score_of_a_linear_model_by_hand():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    weight = [[0.5, -1.0], [2.0, 0.25]]
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(weight))
        model[1].bias.copy_(torch.tensor([0.1, -0.2]))
    # mean 0.2, std 0.5: pixels (255, 51) become (1.6, 0)
    pixels = torch.tensor([[[[255, 51]]], [[[51, 255]]]], dtype=torch.uint8)
    trainer = LocalTrainer(OPTIONS, Transform((0.2,), (0.5,), "none"), torch.device("cpu"))
    scores = snip(trainer.gradient(model, Samples(pixels, torch.tensor([0, 1]))), dict(model.named_parameters()))
    # softmax of two classes: p1 = 1 / (1 + exp(z0 - z1)); dL/dW_c = mean of (p_c - [c = y]) x
    first = 1 / (1 + math.exp((0.5 * 1.6 + 0.1) - (2.0 * 1.6 - 0.2)))  # p1 of image 0, class 0
    second = 1 / (1 + math.exp((-1.0 * 1.6 + 0.1) - (0.25 * 1.6 - 0.2)))  # p1 of image 1, class 1
    gradient = [[-first * 1.6 / 2, (1 - second) * 1.6 / 2], [first * 1.6 / 2, (second - 1) * 1.6 / 2]]
    assert list(scores) == ["1.weight"]
    expected = (torch.tensor(gradient) * torch.tensor(weight)).abs()
    torch.testing.assert_close(scores["1.weight"], expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_autograd_on_the_same_batch_without_augmentation():
    model, data = network(nn.GroupNorm(2, 4)), images(12)
    got = TRAINER.gradient(model, data)
    nn.functional.cross_entropy(model((data.inputs / 255 - 0.5) / 0.25), data.labels).backward()
    assert list(got) == ["0.weight", "4.weight"]
    for name, gradient in got.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-5, atol=1e-7)


def test_the_gradient_leaves_parameters_buffers_and_grads_as_they_were():
    model, data = network(nn.BatchNorm2d(4)), images(9)
    model(torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1)))  # statistics of something else
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    TRAINER.gradient(model, data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert before["1.num_batches_tracked"] == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    model[0].weight.grad = torch.full_like(model[0].weight, 7.0)
    TRAINER.gradient(model, data)
    assert torch.equal(model[0].weight.grad, torch.full_like(model[0].weight, 7.0))


def test_the_gradient_takes_the_statistics_of_the_batch():
    model, data = network(nn.BatchNorm2d(4)), images(9)
    one = TRAINER.gradient(model, data)
    model[1].running_mean.fill_(100.0)
    other = TRAINER.gradient(model, data)
    assert all(torch.equal(one[name], other[name]) for name in one)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 2**32))
@law
def test_a_batch_has_equally_many_images_of_every_class_that_is_present(counts, size, seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(3 * np.arange(len(counts)), counts))  # classes 0, 3, 6, ...
    batch = balanced_batch(labels, size, rng)
    assert batch.dtype == np.int64
    assert batch.shape == (size,)
    assert set(batch) <= set(range(len(labels)))
    for label, have in zip(3 * np.arange(len(counts)), counts, strict=True):
        chosen = batch[labels[batch] == label]
        assert len(chosen) in (size // len(counts), -(-size // len(counts)))
        if len(chosen) <= have:
            assert len(set(chosen)) == len(chosen)  # without replacement


def test_a_class_with_too_few_images_is_drawn_with_replacement():
    labels = np.array([0] * 50 + [1] * 2)
    batch = balanced_batch(labels, 40, np.random.default_rng(1))
    assert len(set(batch[batch < 50])) == 20
    assert sorted(set(batch[batch >= 50])) == [50, 51]


def test_a_batch_smaller_than_the_classes_has_no_class_twice_and_no_favourite():
    labels = np.repeat(np.arange(5), 3)
    rng = np.random.default_rng(2)
    times = np.zeros(5)
    for _ in range(1000):
        classes = labels[balanced_batch(labels, 2, rng)]
        assert len(set(classes)) == 2
        times[classes] += 1
    # 1000 draws of 2 classes out of 5: mean 400, standard deviation 15.5
    assert np.abs(times - 400).max() < 78


def test_every_image_of_a_class_is_as_likely_and_the_order_is_random():
    labels = np.array([0, 0, 0, 0, 1, 1])
    rng = np.random.default_rng(3)
    batches = np.stack([balanced_batch(labels, 4, rng) for _ in range(1000)])
    times = np.bincount(batches.reshape(-1), minlength=6)
    assert times[4:].tolist() == [1000, 1000]
    assert np.abs(times[:4] - 500).max() < 80  # standard deviation 15.8
    assert np.abs((labels[batches] == 1).sum(axis=0) - 500).max() < 80


def test_the_same_generator_gives_the_same_batch():
    labels = np.arange(60) % 7
    one, other, third = (balanced_batch(labels, 20, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, third)


def test_a_plain_batch_has_images_as_they_come_each_once():
    rng = np.random.default_rng(4)
    batches = np.stack([plain_batch(6, 4, rng) for _ in range(1000)])
    assert all(len(set(batch)) == 4 for batch in batches)
    assert np.abs(np.bincount(batches.reshape(-1), minlength=6) - 4000 / 6).max() < 75  # standard deviation 14.9
    assert sorted(plain_batch(6, 64, rng)) == list(range(6))


@pytest.mark.parametrize("size", [1, 3, 64])
def test_one_image_is_enough(size):
    assert balanced_batch(np.array([4]), size, np.random.default_rng(1)).tolist() == [0] * size
