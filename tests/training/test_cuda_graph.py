"""The fast training step against the plain one, bit for bit, and when it is used.

Here it runs uncaptured: the same code on the same buffers, without a GPU. What is around a capture runs on a stand-in
for CUDA's graphs; that a real one does the same is checked by ``benchmarks/gpu_window.py``.
"""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssfl_app.data.dataset import Samples, Transform
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask
from ssfl_app.training import cuda_graph as captured
from ssfl_app.training.anchor import Proximal, Pull
from ssfl_app.training.models import ModelOptions, create
from ssfl_app.training.reparam import power_propagation, sparse_activations
from ssfl_app.training.step import EagerStep, LocalOptions, has_plain_forward, set_precision
from ssfl_app.training.trainer import LocalTrainer

SOFT = {
    "epochs": 2, "batch_size": 8, "lr": 0.1, "lr_decay": 0.998, "momentum": 0.0, "weight_decay": 0.0, "clip": 0.0,
}  # fmt: skip
HARD = {"momentum": 0.9, "weight_decay": 0.01, "clip": 0.5}


def trainer(steps, augment="crop-flip", **changes):
    transform = Transform((0.4, 0.5), (0.2, 0.25), augment)
    return LocalTrainer(LocalOptions(**SOFT | changes), transform, torch.device("cpu"), "fp32", steps)


def images(count, seed=1, side=8):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, size=(count, 2, side, side), dtype=np.uint8)
    return Samples(torch.from_numpy(pixels), torch.from_numpy(rng.integers(0, 3, count)))


def network(name="cnn", norm="group"):
    return create(ModelOptions(name, norm), (2, 8, 8), 3, seed=1)


def half(model, seed=1, density=0.3):
    return Mask.random(Layout.of(model), density, np.random.default_rng(seed))


def bits(model):
    """Return what the state is down to the sign of its zeros."""
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


class Twins:
    """A plain and a static trainer that are asked the same."""

    def __init__(self, name="cnn", norm="group", augment="crop-flip", **changes):
        self.trainers = trainer("plain", augment, **changes), trainer("static", augment, **changes)
        self.models = network(name, norm), network(name, norm)

    def fit(self, data, lr=0.1, masked=None, seed=1, **more):
        """Let both train and return the loss, which is the same."""
        losses = [
            run.fit(model, data, np.random.default_rng(seed), lr=lr, mask=masked, **more)
            for run, model in zip(self.trainers, self.models, strict=True)
        ]
        plain, static = self.models
        assert losses[0] == losses[1]
        assert bits(plain) == bits(static)
        assert self.trainers[0].passes == self.trainers[1].passes
        return losses[0]


CNNS = [
    ("cnn", norm, hyper, masked) for norm in ("group", "batch") for hyper in ({}, HARD) for masked in (False, True)
]


# A step does not look at its model: of the large one the two ends are enough.
@pytest.mark.parametrize(
    ("name", "norm", "hyper", "masked"),
    [*CNNS, ("resnet20", "group", {}, False), ("resnet20", "group", HARD, True)],
)
def test_it_trains_to_the_same_bits_as_the_plain_step(name, norm, hyper, masked):
    twins = Twins(name, norm, **hyper)
    before = bits(twins.models[0])
    twins.fit(images(19), masked=half(twins.models[0]) if masked else None)  # 8, 8 and 3 images a pass
    assert bits(twins.models[0]) != before
    assert twins.trainers[0].passes == 38


def test_batches_that_were_merged_are_the_same_for_both():
    twins = Twins("cnn", "batch", batch_size=4)
    for run in twins.trainers:
        run.fewest = 2
    for count in (9, 8, 5, 9):  # 4 and 5 images; twice 4; 5
        twins.fit(images(count, side=1), masked=half(twins.models[0]))


@settings(max_examples=8, deadline=None)
@given(
    clients=st.lists(
        st.tuples(st.integers(1, 21), st.sampled_from([0.01, 0.1, 0.3]), st.sampled_from([None, 1, 2])),
        min_size=2,
        max_size=4,
    ),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    clip=st.sampled_from([0.0, 0.3]),
    batch_size=st.integers(1, 9),
    augment=st.sampled_from(["none", "crop-flip"]),
)
def test_clients_one_after_the_other_share_a_step(clients, momentum, weight_decay, clip, batch_size, augment):
    """Sizes, rates and masks change from call to call; neither momentum nor a mask is left over."""
    twins = Twins(augment=augment, momentum=momentum, weight_decay=weight_decay, clip=clip, batch_size=batch_size)
    for turn, (count, lr, seed) in enumerate(clients):
        masked = None if seed is None else half(twins.models[0], seed)
        twins.fit(images(count, turn), lr, masked, seed=turn)
    assert isinstance(twins.trainers[1]._static, captured.GraphedStep)


def away(model, seed=2):
    """Return other weights than the model's."""
    rng = torch.Generator().manual_seed(seed)
    return [p.detach() + 0.1 * torch.randn(p.shape, generator=rng) for p in model.parameters()]


@pytest.mark.parametrize("hyper", [{}, HARD])
@pytest.mark.parametrize("masked", [False, True])
def test_near_an_anchor_it_trains_to_the_same_bits_too(hyper, masked):
    """The gradient of the term is the derived one; centres and strengths change from call to call."""
    twins, plain = Twins(**hyper), Twins(**hyper)
    mask = half(twins.models[0]) if masked else None
    for count, mu, seed in [(19, 0.5, 2), (11, 0.1, 3), (19, 3.0, 4)]:
        twins.fit(images(count, seed), masked=mask, penalty=Proximal(away(twins.models[0], seed), mu))
        plain.fit(images(count, seed), masked=mask)
    assert isinstance(twins.trainers[1]._static, captured.GraphedStep)
    assert bits(twins.models[0]) != bits(plain.models[0])


def test_an_anchor_holds_what_the_loss_does_not_see():
    twins = Twins()
    for model in twins.models:
        model[0].register_parameter("extra", nn.Parameter(torch.ones(3)))
    twins.fit(images(9), penalty=Proximal([torch.zeros_like(p) for p in twins.models[0].parameters()], 0.5))
    assert (twins.models[1][0].extra < 1).all()


@pytest.mark.parametrize("hyper", [{}, HARD])
def test_pulled_towards_an_anchor_it_trains_to_the_same_weights_but_for_rounding(hyper):
    runs, models = (trainer("plain", **hyper), trainer("static", **hyper)), (network(), network())
    far = network()
    for count, strength, seed in [(19, 0.05, 2), (11, 0.2, 3)]:
        towards = away(models[0], seed)
        data = images(count, seed)
        for run, model in zip(runs, models, strict=True):
            run.fit(model, data, np.random.default_rng(seed), lr=0.1, after_step=Pull(towards, strength))
        runs[1].fit(far, data, np.random.default_rng(seed), lr=0.1)
    assert runs[1]._static is not None
    for one, other, free in zip(*(model.parameters() for model in (*models, far)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert (one - free).abs().max() > 1e-3


def test_a_pull_under_a_mask_takes_plain_steps():
    """What it does to dead weights lasts until the next step masks them."""
    twins = Twins()
    twins.fit(images(9), masked=half(twins.models[0]), after_step=Pull(away(twins.models[0]), 0.1))
    assert twins.trainers[1]._static is None


class Graphs:
    """Stands in for CUDA: what is captured does not run, what is replayed does."""

    def __init__(self, monkeypatch):
        self.made, self.pools, capturing, real = [], [], [], captured.GraphedStep._step
        graphs = self

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                assert capture_error_mode == "thread_local"
                graphs.pools.append(pool)
                graphs.made.append(self)
                capturing.append(self)
                self.replays = 0

            def capture_end(self):
                capturing.remove(self)

            def pool(self):
                return (0, 7)

            def replay(self):
                self.replays += 1
                real(*self.what)

        def step(static, batch):
            if capturing:
                capturing[0].what = (static, batch)
            else:
                real(static, batch)

        class Stream:
            def wait_stream(self, other):
                pass

        monkeypatch.setattr(captured.GraphedStep, "_step", step)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(captured, "own_stream", lambda holder, device: Stream())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        stream = Stream()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)


@pytest.mark.parametrize(("norm", "hyper"), [("group", HARD), ("batch", HARD), ("batch", {})])
def test_a_capture_leaves_no_trace(monkeypatch, norm, hyper):
    """Weights, statistics, momentum and losses are those before it, whenever in a pass a batch size first occurs."""
    graphs, twins = Graphs(monkeypatch), Twins("cnn", norm, **hyper)
    twins.trainers[1].steps = "graphs"
    mask = half(twins.models[0])
    for count, masked in [(19, mask), (19, None), (11, mask), (13, mask)]:
        twins.fit(images(count), masked=masked)
    # Batches of 8 and 3 with and without a mask, then one of 5.
    assert len(graphs.made) == 5
    assert graphs.pools == [None] + [(0, 7)] * 4
    assert sum(graph.replays for graph in graphs.made) == 2 * (3 + 3 + 2 + 2)


IMAGE = 2 * 8 * 8 * 4
"""Bytes of one of `images` as float32."""


@pytest.mark.parametrize("ahead", [1, 8 * IMAGE, 17 * IMAGE])
def test_images_prepared_in_pieces_are_the_same_images(monkeypatch, ahead):
    monkeypatch.setattr(captured, "AHEAD", ahead)
    Twins(batch_size=4).fit(images(23))


@pytest.mark.parametrize(("side", "pieces"), [(8, [64]), (16, [48, 16]), (32, [8] * 8), (64, [8] * 8)])
def test_images_are_prepared_by_bytes_not_by_number(side, pieces):
    """As many batches of 8 as 48 images of 16 pixels a side take, whatever their size; at least one batch."""
    made, ahead = [], 48 * 2 * 16 * 16 * 4
    for inputs, _ in trainer("static")._epoch(images(64, side=side), np.random.default_rng(1), ahead):
        storage = inputs.untyped_storage()
        made += [storage.nbytes() // (inputs[0].numel() * 4)] if inputs.storage_offset() == 0 else []
        assert storage.nbytes() <= max(ahead, 8 * inputs[0].numel() * 4)
    assert made == pieces


def test_the_plain_step_prepares_a_batch_at_a_time():
    """Its batches lie in memory of their own: kernels may round differently on parts of larger ones."""
    data, seen = images(19), []
    for inputs, labels in trainer("plain")._epoch(data, np.random.default_rng(1), EagerStep.ahead):
        assert inputs.storage_offset() == 0
        assert inputs.untyped_storage().nbytes() == inputs.nbytes
        seen.append(len(labels))
    assert seen == [8, 8, 3]


def test_an_epoch_draws_what_single_batches_draw():
    """Order first, then crop and mirror image batch by batch: the draws of a run are older than this loop."""
    data, transform = images(19, side=32), trainer("plain").transform
    run, rng, again = trainer("static"), np.random.default_rng(1), np.random.default_rng(1)
    for _ in range(2):
        order = again.permutation(19)
        batches = list(run._epoch(data, rng, 1 << 20))
        for (inputs, labels), chosen in zip(batches, (order[:8], order[8:16], order[16:]), strict=True):
            pixels, padded = data.inputs[chosen], nn.functional.pad(data.inputs[chosen], (4, 4, 4, 4))
            corners, mirror = again.integers(0, 9, size=(2, len(chosen), 1)), again.random((len(chosen), 1)) < 0.5
            crops = [
                image[:, y : y + 32, x : x + 32].flip(2) if flip else image[:, y : y + 32, x : x + 32]
                for image, y, x, flip in zip(padded, *corners[..., 0], mirror[:, 0], strict=True)
            ]
            assert pixels.shape == inputs.shape
            assert torch.equal(inputs, transform.test(torch.stack(crops)))
            assert torch.equal(labels, data.labels[chosen])


def test_buffers_stay_where_they_are_from_client_to_client():
    twins = Twins(**HARD)
    twins.fit(images(19), masked=half(twins.models[1]))
    step = twins.trainers[1]._static

    def places():
        batches = [tensor for batch in step._batches.values() for tensor in (batch.inputs, batch.labels)]
        held = [*step._parameters, *step._momenta, *step._bits, step._lr, step._total, *batches]
        return [tensor.data_ptr() for tensor in held]

    before = places()
    twins.fit(images(11, seed=2), lr=0.01, masked=half(twins.models[1], seed=2))
    assert twins.trainers[1]._static is step
    assert places() == before
    assert sorted(size[0] for size, *_ in step._batches) == [3, 8]


def test_another_model_gets_a_step_of_its_own():
    run, data = trainer("static"), images(9)
    models = network(), network()
    for model in models:
        run.fit(model, data, np.random.default_rng(1), lr=0.1)
    assert bits(models[0]) == bits(models[1])
    step = run._static
    assert step.serves(models[1])
    assert not step.serves(models[0])
    models[1][0].weight = nn.Parameter(models[1][0].weight.detach().clone())
    assert not step.serves(models[1])


@pytest.mark.parametrize(
    "special",
    [
        {"penalty": lambda model: 0.1 * sum(p.square().sum() for p in model.parameters())},
        {"after_step": lambda model: model[0].weight.data.mul_(0.9)},
        {"optimizer": torch.optim.Adam},
    ],
)
def test_what_the_static_step_cannot_do_takes_plain_steps(special):
    twins = Twins()
    twins.fit(images(9), **special)
    assert twins.trainers[1]._static is None
    twins.fit(images(9))  # and back: gradients of the plain step do not disturb
    assert twins.trainers[1]._static is not None


KEEP = dict.fromkeys(Layout.of(network()).prunable, 0.5)


@pytest.mark.parametrize("context", [lambda m: power_propagation(m, 1.25), lambda m: sparse_activations(m, KEEP)])
def test_a_changed_forward_pass_takes_plain_steps(context):
    twins = Twins()
    twins.fit(images(9))
    contexts = [context(model) for model in twins.models]
    with contexts[0], contexts[1]:
        step = twins.trainers[1]._step(twins.models[1], 0.1, None, frozen=False)
        assert isinstance(step, EagerStep)
        losses = [
            run.fit(model, images(9), np.random.default_rng(2), lr=0.1)
            for run, model in zip(twins.trainers, twins.models, strict=True)
        ]
    assert losses[0] == losses[1]
    assert bits(twins.models[0]) == bits(twins.models[1])
    twins.fit(images(9), seed=3)


def test_what_changes_a_model_is_noticed():
    model = network()
    assert has_plain_forward(model)
    handles = [
        model[0].register_forward_hook(lambda *_: None),
        model[1].register_forward_pre_hook(lambda *_: None),
        model[0].register_full_backward_hook(lambda *_: None),
        model[0].weight.register_hook(lambda grad: grad),
    ]
    for handle in handles:
        assert not has_plain_forward(model)
        handle.remove()
        others = handles[handles.index(handle) + 1 :]
        assert has_plain_forward(model) == (not others)
    model[0].weight.requires_grad_(False)
    assert not has_plain_forward(model)


@pytest.fixture
def torch_settings():
    """Put torch's settings of a GPU back."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    yield
    cuda.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", True)])
def test_a_gpu_multiplies_as_precision_says_and_repeats_itself(torch_settings, precision, tf32):
    for before in ("bf16", "fp32"):
        set_precision(before)
        set_precision(precision)
        assert torch.backends.cuda.matmul.allow_tf32 is tf32
        assert torch.backends.cudnn.allow_tf32 is tf32
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") is tf32
        assert (torch.backends.cudnn.conv.fp32_precision == "tf32") is tf32
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark


def test_on_the_cpu_precision_changes_no_bit_and_no_setting():
    models = []
    for precision in ("fp32", "bf16"):
        run = trainer("plain")
        run.precision = precision
        models.append(network())
        before = torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
        run.fit(models[-1], images(9), np.random.default_rng(1), lr=0.1)
        assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32) == before
    assert bits(models[0]) == bits(models[1])


@pytest.mark.parametrize("seed", [1, 2])
def test_dead_weights_stay_dead_without_being_masked_again(seed):
    """The static step masks weights once; a step of momentum, decay and clipping leaves a zero a zero."""
    run, model = trainer("static", **HARD), network()
    mask = half(model, seed)
    run.fit(model, images(19), np.random.default_rng(seed), lr=0.3, mask=mask, epochs=3)
    for name, alive in mask.tensors().items():
        weights = dict(model.named_parameters())[name]
        assert (weights[~alive] == 0).all()
        assert (weights[alive] != 0).float().mean() > 0.9


def test_the_loss_that_is_reported_is_that_of_this_call():
    run, model = trainer("static"), network()
    losses = [run.fit(model, images(9), np.random.default_rng(1), lr=0.05, epochs=4) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)  # a sum over calls would grow
    assert losses[-1] < 0.8 * losses[0]
