"""Fused GroupNorm in Triton against torch's, and a model that trains with it, on the CPU by Triton's interpreter.

No GPU has run it yet: what an NVIDIA compiler makes of the kernels is looked at, their speed is asked by
``benchmarks/gpu_window.py``. Without Triton, which torch for CUDA brings, these tests are skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ssfl_app.data.dataset import Samples, Transform
from ssfl_app.options import ConfigError
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask
from ssfl_app.training.anchor import Proximal
from ssfl_app.training.cuda_graph import GraphedStep
from ssfl_app.training.fused import FusedModel, check_fused
from ssfl_app.training.models import REGISTRY, ModelOptions, create
from ssfl_app.training.step import LocalOptions
from ssfl_app.training.trainer import LocalTrainer

triton = pytest.importorskip("triton", reason="no Triton here: torch for CUDA brings it")

from ssfl_app.training.fused_norm import group_norm_act  # noqa: E402

ROOT = Path(__file__).parents[2]
BF16 = 2.0**-7
"""Distance of two neighbouring numbers of bfloat16 near 1; the interpreter cuts where a GPU rounds to the nearest."""


def numbers(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def twin(x, weight, bias, groups, shortcut, relu):
    """Return what torch computes in float64."""
    y = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
    y = y if shortcut is None else y + shortcut.double()
    return F.relu(y) if relu else y


@pytest.mark.parametrize(
    ("shape", "groups"),
    # The widest stages of ResNet-18, one image and pixel, 3 and 5 channels a group, more pixels than a tile has.
    [((2, 64, 4, 4), 32), ((1, 512, 1, 1), 32), ((3, 12, 3, 5), 4), ((2, 5, 2, 2), 1), ((1, 16, 20, 20), 8)],
)
@pytest.mark.parametrize(("added", "relu"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torchs_group_norm_forward_and_backward(shape, groups, added, relu, dtype):
    x, shortcut, up = (numbers(*shape, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    weight, bias = numbers(shape[1], seed=4), numbers(shape[1], seed=5)
    leaves = [x, weight, bias, *([shortcut] if added else [])]
    results = []
    for compute in (
        lambda s: group_norm_act(x, weight, bias, groups, 1e-5, shortcut=s, relu=relu),
        lambda s: twin(x, weight, bias, groups, s, relu),
    ):
        for leaf in leaves:
            leaf.grad = None
            leaf.requires_grad_()
        y = compute(shortcut if added else None)
        y.backward(up.to(y.dtype))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    ours, theirs = results
    assert ours[0].dtype == dtype
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert ours[2].dtype == torch.float32
    near = {"rtol": 2 * BF16, "atol": 2 * BF16} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 2e-5}
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other.double(), **near)


def test_what_diverged_stays_so_behind_relu():
    x = numbers(1, 4, 2, 2)
    x[0, 0, 0, 0] = float("nan")
    y = group_norm_act(x, torch.ones(4), torch.zeros(4), 2, 1e-5, relu=True)
    assert y[0, :2].isnan().all()
    assert y[0, 2:].isfinite().all()


COMPILED = """
import inspect, subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ssfl_app.training import fused_norm

ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
for kernel in (fused_norm._forward, fused_norm._backward):
    for each, groups in ((2, 8), (16, 1)):
        names = list(inspect.signature(kernel.fn).parameters)
        sizes = {"added": True, "relu": True, "each": each}
        sizes |= {"block_p": fused_norm.TILE // 16, "block_g": groups, "block_c": each}
        whole, single = ("pixels", "channels", "groups", "images"), ("weight", "bias", "means", "scales", "parts")
        types = {name: "i32" if name in whole else "*fp32" if name in single else "*bf16" for name in names}
        types |= {"eps": "fp32"} if "eps" in names else {}
        types |= dict.fromkeys(sizes, "constexpr")
        source = ASTSource(kernel, types, constexprs={(names.index(name),): value for name, value in sizes.items()})
        made = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": fused_norm.WARPS})
        Path(sys.argv[1]).write_bytes(made.asm["cubin"])
        used = subprocess.run([ptxas, "-res-usage", sys.argv[1]], capture_output=True, text=True, check=True).stdout
        ptx = made.asm["ptx"]
        print("atom" in ptx or "red.global" in ptx, "cvt.rn.bf16" in ptx, used.split()[-7:])
"""


def test_compiled_for_an_h100_it_has_no_atomics_rounds_to_the_nearest_and_spills_nothing(tmp_path):
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPILED, str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert line.startswith("False True "), line
        assert "'LOCAL:0'" in line, line
        assert "'STACK:0'" in line, line


# ---- models ---------------------------------------------------------------------------------------


def network(name, width=0.25, seed=1):
    return create(ModelOptions(name, "group", width), (3, 8, 8), 4, seed)


@pytest.mark.parametrize("name", ["cnn", "conv4", "resnet18", "resnet20", "resnet50"])
def test_a_fused_model_computes_what_the_model_does(name):
    model, x = network(name, 1 / 16), numbers(2, 3, 32, 32)  # the last norms see 16 pixels, not one
    fused = FusedModel(model, torch.float32)
    outputs, gradients = [], []
    for compute in (model, fused):
        model.zero_grad()
        outputs.append(compute(x))
        F.cross_entropy(outputs[-1], torch.tensor([1, 3])).backward()
        fused.hand_over()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
    for one, other in zip(*gradients, strict=True):  # where ReLU is at 0 rounding decides
        assert (one - other).norm() < 0.01 * other.norm()
    left = [module for module in fused._network.modules() if isinstance(module, (nn.GroupNorm, nn.ReLU))]
    assert [type(module) for module in left] == [nn.ReLU] * (name == "cnn")  # the one behind a linear layer


def test_a_model_of_ones_own_keeps_its_forward_pass():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(torch.sigmoid(self.norm(self.conv(x))).mean((2, 3)))

    model, x = Own(), numbers(2, 3, 5, 5)
    check_fused(model, "own")
    torch.testing.assert_close(FusedModel(model, torch.float32)(x), model(x), rtol=1e-4, atol=1e-5)


def test_models_without_a_fused_form_are_refused_by_name():
    for norm, odd in (("batch", "no GroupNorm with weights"), ("none", "no GroupNorm with weights")):
        with pytest.raises(ConfigError, match=f"'fused'; it is 'torch' with model.name 'cnn', which has {odd}"):
            check_fused(create(ModelOptions("cnn", norm), (3, 8, 8), 4, 1), "cnn")
    tokens = REGISTRY["transformer"]((6,), 9, "group")
    with pytest.raises(ConfigError, match="which has no GroupNorm"):
        check_fused(tokens, "transformer")
    mixed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.PReLU())
    with pytest.raises(ConfigError, match="which has PReLU"):
        check_fused(mixed, "mixed")


# ---- training -------------------------------------------------------------------------------------


def trainer(kernels, **changes):
    recipe = {"epochs": 2, "batch_size": 4, "lr": 0.05, "lr_decay": 1.0, "momentum": 0.9, "weight_decay": 0.01}
    options = LocalOptions(**recipe | {"clip": 0.5} | changes)
    transform = Transform((0.4, 0.5, 0.5), (0.2, 0.25, 0.2), "none")
    return LocalTrainer(options, transform, torch.device("cpu"), "fp32", "static", kernels=kernels)


def images(count):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, size=(count, 3, 8, 8), dtype=np.uint8)
    return Samples(torch.from_numpy(pixels), torch.from_numpy(rng.integers(0, 4, count)))


def test_it_trains_like_torchs_kernels_under_masks_and_near_anchors():
    models = network("cnn"), network("cnn")
    mask, data = Mask.random(Layout.of(models[0]), 0.3, np.random.default_rng(1)), images(7)
    centre = [torch.zeros_like(p) for p in models[0].parameters()]
    runs = trainer("torch"), trainer("fused")
    losses = [
        run.fit(model, data, np.random.default_rng(1), lr=0.05, mask=mask, penalty=Proximal(centre, 0.1))
        for run, model in zip(runs, models, strict=True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    for name, alive in mask.tensors().items():
        assert (dict(models[1].named_parameters())[name][~alive] == 0).all()


def test_weights_in_half_precision_are_copies_and_gradients_come_back_in_float32():
    model, data = network("cnn"), images(4)
    step = GraphedStep(model, trainer("fused").options, autocast=False, capture=False, fused=torch.bfloat16)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs = trainer("fused").transform.test(data.inputs)
    step.begin(0.05, None)
    step(inputs, data.labels)
    first, places = step.total(), [p.grad.data_ptr() for p in step._fused._weights]
    for _ in range(5):
        step(inputs, data.labels)
    assert [p.grad.data_ptr() for p in step._fused._weights] == places  # a graph has them at fixed addresses
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in step._fused._copies)
    kinds = {name.rpartition(".")[2] for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert kinds == {"weight", "bias"}
    last = step.total()
    step(inputs, data.labels)
    assert step.total() - last < first  # it learnt
    for weight, copied in zip(step._fused._weights, step._fused._copies, strict=True):
        torch.testing.assert_close(weight.detach(), copied.detach().float(), rtol=0.2, atol=0.05)


def test_half_precision_stays_near_float32():
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, data = network("cnn"), images(4)
        step = GraphedStep(model, trainer("fused").options, autocast=False, capture=False, fused=dtype)
        step.begin(0.02, None)
        for _ in range(4):
            step(trainer("fused").transform.test(data.inputs), data.labels)
        losses[dtype] = step.total() / 16
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.02)
    assert losses[torch.bfloat16] != losses[torch.float32]
