"""The transform that makes network input of a batch of bytes: augmentation and normalisation.

What is random is drawn on the CPU (`Transform.draw`) and applied where the images are (`Transform.apply`): every
device gets the same batch, and many batches can be drawn before one is made.
"""

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional


@dataclass(frozen=True)
class Transform:
    """Makes network input of pixels, a batch at a time, on the pixels' own device.

    Attributes
    ----------
    mean, std : tuple of C floats
        Of each channel, in units of pixel / 255.
    augment : str
        What `train` does before it normalises: ``"none"``, or ``"crop-flip"``.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str

    def train(self, pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Return a training batch, float32 (B, C, H, W), of uint8 `pixels`: augmented as asked for, normalised."""
        return self.apply(pixels, torch.from_numpy(self.draw(pixels, rng)).to(pixels.device))

    def draw(self, pixels: torch.Tensor, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Draw what `apply` needs for a batch (B, C, H, W) of which only the shape counts: int64, (3, B).

        How far down and to the right each crop lies in the padded image, and 1 for its mirror image; no rows, and
        nothing is drawn, if `augment` is ``"none"``.
        """
        count, _, height, width = pixels.shape
        if self.augment == "none":
            return np.empty((0, count), dtype=np.int64)
        corners = rng.integers(0, 2 * padding(min(height, width)) + 1, size=(2, count, 1))
        mirror = rng.random((count, 1)) < 0.5
        return np.concatenate([corners, mirror[None]])[..., 0]

    def apply(self, pixels: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return what `train` returns, by the numbers that `draw` drew, on the device of `pixels`."""
        return self.test(pixels if self.augment == "none" else _crop_flip(pixels, *draws[:, :, None]))

    def test(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return (pixel / 255 - mean) / std as float32, shape (B, C, H, W), of uint8 `pixels`.

        Bit for bit torchvision's `ToTensor` and `Normalize`.
        """
        mean, std = _moments(self.mean, self.std, pixels.device)
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


class AsTheyAre:
    """Where inputs are no images: numbers as float32, tokens (integers) as they are. Nothing is random."""

    augment = "none"

    def draw(self, inputs: torch.Tensor, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Draw nothing."""
        return np.empty((0, len(inputs)), dtype=np.int64)

    def apply(self, inputs: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return what `test` returns."""
        return self.test(inputs)

    def test(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the input of a network."""
        return inputs.float() if inputs.is_floating_point() else inputs


def padding(side: int) -> int:
    """Return how far a crop may move an image of `side` pixels: 4, and less on images below 16 pixels."""
    return 4 if side >= 16 else side // 8


@functools.lru_cache(maxsize=16)
def _moments(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return mean and std, shape (2, C, 1, 1); kept, since a copy to a GPU waits for all that it has to do."""
    return torch.tensor([mean, std], device=device)[..., None, None]


def _crop_flip(pixels: torch.Tensor, down: torch.Tensor, right: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
    """Crop each image (B, C, H, W) out of its zero-padded self at (B, 1) places; mirror those that are to be.

    Zero is the raw pixel, as in torchvision's `RandomCrop`: after normalising, the border is -mean / std.
    """
    count, channels, height, width = pixels.shape
    pad = padding(min(height, width))
    across = torch.arange(width, device=pixels.device)
    rows = down + torch.arange(height, device=pixels.device)
    columns = right + torch.where(mirror > 0, across.flip(0), across)
    # One place in the padded plane for each pixel of the crop, the same in all channels.
    places = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).reshape(count, 1, -1)
    planes = functional.pad(pixels, (pad, pad, pad, pad)).flatten(2)
    return planes.gather(2, places.expand(-1, channels, -1)).view(pixels.shape)
