"""GroupNorm, the addition of a shortcut and ReLU in one kernel each way, on images whose channels come last.

Torch's GroupNorm on a GPU wants channels first, and float32 under autocast: with the addition and ReLU behind it that
is a dozen kernels, and convolutions change the layout back. These two, in Triton, read and write bfloat16 or float32
as it lies. Statistics and sums are float32, over an image's values in a fixed order and without atomics: the same
input gives the same bits. ``tests/training/test_fused.py`` holds them against torch's by Triton's interpreter.

Wu and He, "Group normalization", ECCV 2018.
"""

from typing import Any

import torch
import triton
import triton.language as tl

CHANNELS = 16
"""Channels that a program works on, at least: 32 bytes of bfloat16, what a GPU reads at a time."""

TILE = 4096
"""Values of a program in flight at once, at most, where one pixel of a group has no more."""

WARPS = 8


@triton.jit  # type: ignore
def _forward(  # type: ignore[no-untyped-def]
    x, shortcut, y, weight, bias, means, scales, pixels, channels, groups, eps,
    added: tl.constexpr, relu: tl.constexpr,
    each: tl.constexpr, block_p: tl.constexpr, block_g: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    # One image, block_g of its groups of each channels; tiles are (pixel, group, channel of the group).
    image, inner = tl.program_id(0), tl.arange(0, block_c)
    group = tl.program_id(1) * block_g + tl.arange(0, block_g)
    channel = group[:, None] * each + inner[None, :]
    there = (group[:, None] < groups) & (inner[None, :] < each)
    start = image.to(tl.int64) * pixels * channels
    count = pixels * each

    total = tl.zeros((block_p, block_g, block_c), tl.float32)
    for first in range(0, pixels, block_p):
        pixel = first + tl.arange(0, block_p)
        valid = (pixel < pixels)[:, None, None] & there[None, :, :]
        where = start + pixel[:, None, None] * channels + channel[None, :, :]
        total += tl.load(x + where, mask=valid, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(total, axis=0), axis=1) / count

    total = tl.zeros((block_p, block_g, block_c), tl.float32)
    for first in range(0, pixels, block_p):
        pixel = first + tl.arange(0, block_p)
        valid = (pixel < pixels)[:, None, None] & there[None, :, :]
        where = start + pixel[:, None, None] * channels + channel[None, :, :]
        off = tl.load(x + where, mask=valid, other=0.0).to(tl.float32) - mean[None, :, None]
        total += tl.where(valid, off * off, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(tl.sum(total, axis=0), axis=1) / count + eps)

    gain = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32) * scale[:, None]
    shift = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    for first in range(0, pixels, block_p):
        pixel = first + tl.arange(0, block_p)
        valid = (pixel < pixels)[:, None, None] & there[None, :, :]
        where = start + pixel[:, None, None] * channels + channel[None, :, :]
        off = tl.load(x + where, mask=valid, other=0.0).to(tl.float32) - mean[None, :, None]
        z = off * gain[None, :, :] + shift[None, :, :]
        if added:
            z += tl.load(shortcut + where, mask=valid, other=0.0).to(tl.float32)
        if relu:
            z = tl.where(z < 0, 0.0, z)  # not the maximum: a diverged value stays none
        tl.store(y + where, z.to(y.dtype.element_ty), mask=valid)
    tl.store(means + image * groups + group, mean, mask=group < groups)
    tl.store(scales + image * groups + group, scale, mask=group < groups)


@triton.jit  # type: ignore
def _backward(  # type: ignore[no-untyped-def]
    x, y, dy, weight, means, scales, dx, dshortcut, parts, images, pixels, channels, groups,
    added: tl.constexpr, relu: tl.constexpr,
    each: tl.constexpr, block_p: tl.constexpr, block_g: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    # With n = (x - mean) scale, dz the gradient before ReLU and g = weight dz:
    # dx = scale (g - mean of g - n mean of g n); parts has sums of dz n and of dz over the pixels of each image.
    image, inner = tl.program_id(0), tl.arange(0, block_c)
    group = tl.program_id(1) * block_g + tl.arange(0, block_g)
    channel = group[:, None] * each + inner[None, :]
    there = (group[:, None] < groups) & (inner[None, :] < each)
    start = image.to(tl.int64) * pixels * channels
    count = pixels * each
    mean = tl.load(means + image * groups + group, mask=group < groups, other=0.0)
    scale = tl.load(scales + image * groups + group, mask=group < groups, other=0.0)

    along = tl.zeros((block_p, block_g, block_c), tl.float32)
    plain = tl.zeros((block_p, block_g, block_c), tl.float32)
    for first in range(0, pixels, block_p):
        pixel = first + tl.arange(0, block_p)
        valid = (pixel < pixels)[:, None, None] & there[None, :, :]
        where = start + pixel[:, None, None] * channels + channel[None, :, :]
        dz = tl.load(dy + where, mask=valid, other=0.0).to(tl.float32)
        if relu:
            dz = tl.where(tl.load(y + where, mask=valid, other=0.0).to(tl.float32) <= 0, 0.0, dz)
        n = (tl.load(x + where, mask=valid, other=0.0).to(tl.float32) - mean[None, :, None]) * scale[None, :, None]
        along += dz * n
        plain += dz
    of_weight, of_bias = tl.sum(along, axis=0), tl.sum(plain, axis=0)
    tl.store(parts + image * channels + channel, of_weight, mask=there)
    tl.store(parts + (images + image) * channels + channel, of_bias, mask=there)

    gain = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    mean_along, mean_plain = tl.sum(gain * of_weight, axis=1) / count, tl.sum(gain * of_bias, axis=1) / count
    for first in range(0, pixels, block_p):
        pixel = first + tl.arange(0, block_p)
        valid = (pixel < pixels)[:, None, None] & there[None, :, :]
        where = start + pixel[:, None, None] * channels + channel[None, :, :]
        dz = tl.load(dy + where, mask=valid, other=0.0).to(tl.float32)
        if relu:
            dz = tl.where(tl.load(y + where, mask=valid, other=0.0).to(tl.float32) <= 0, 0.0, dz)
        if added:
            tl.store(dshortcut + where, dz.to(dshortcut.dtype.element_ty), mask=valid)
        n = (tl.load(x + where, mask=valid, other=0.0).to(tl.float32) - mean[None, :, None]) * scale[None, :, None]
        off = gain[None, :, :] * dz - mean_plain[None, :, None] - n * mean_along[None, :, None]
        tl.store(dx + where, (off * scale[None, :, None]).to(dx.dtype.element_ty), mask=valid)


def _launch(x: torch.Tensor, groups: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid of a kernel and the sizes of its tiles."""
    images, channels, height, width = x.shape
    each = channels // groups
    block_c = triton.next_power_of_2(each)
    block_g = min(max(1, CHANNELS // block_c), triton.next_power_of_2(groups))
    block_p = min(max(1, TILE // (block_c * block_g)), triton.next_power_of_2(height * width))
    sizes = {"each": each, "block_p": block_p, "block_g": block_g, "block_c": block_c, "num_warps": WARPS}
    return (images, triton.cdiv(groups, block_g)), sizes


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        shortcut: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
        groups: int,
        eps: float,
        relu: bool,
    ) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        beside = x if shortcut is None else shortcut.to(x.dtype).contiguous(memory_format=torch.channels_last)
        y = torch.empty_like(x)
        images, channels, height, width = x.shape
        means, scales = x.new_empty((2, images, groups), dtype=torch.float32)
        grid, sizes = _launch(x, groups)
        _forward[grid](
            x, beside, y, weight, bias, means, scales, height * width, channels, groups, eps,
            added=shortcut is not None, relu=relu, **sizes,
        )  # fmt: skip
        ctx.save_for_backward(x, y if relu else x, weight, means, scales)
        ctx.groups, ctx.relu, ctx.added = groups, relu, shortcut is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, y, weight, means, scales = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        dshortcut = torch.empty_like(x) if ctx.added else None
        images, channels, height, width = x.shape
        parts = x.new_empty((2, images, channels), dtype=torch.float32)
        grid, sizes = _launch(x, ctx.groups)
        _backward[grid](
            x, y, dy, weight, means, scales, dx, dx if dshortcut is None else dshortcut, parts,
            images, height * width, channels, ctx.groups, added=ctx.added, relu=ctx.relu, **sizes,
        )  # fmt: skip
        of_weight, of_bias = parts.sum(dim=1).to(weight.dtype)
        return dx, dshortcut, of_weight, of_bias, None, None, None


def group_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    *,
    shortcut: torch.Tensor | None = None,
    relu: bool = False,
) -> torch.Tensor:
    """Return GroupNorm of images, plus a shortcut, through ReLU: what is asked of these.

    Parameters
    ----------
    x : tensor of bfloat16 or float32, shape (B, C, H, W)
        In channels-last layout, or it is copied to that.
    weight, bias : tensor of float32, shape (C,)
    groups : int
        It divides C.
    shortcut : tensor, shape (B, C, H, W), optional
        Added before ReLU.

    Returns
    -------
    tensor of x's type and shape, channels last
    """
    return _NormAct.apply(x, shortcut, weight, bias, groups, eps, relu)  # type: ignore[no-any-return]
