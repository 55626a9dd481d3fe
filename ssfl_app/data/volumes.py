"""Volumes in NIfTI files: classes by folder, or masks that say the class of each voxel.

A volume is turned to the nearest of the axes right, front, top and becomes float32 (C, D, H, W), D from bottom to
top; C is 1 but for files of four axes. Values are less the mean of the training volumes, by their standard deviation.
All have one size: bring them to one grid of voxels before.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ssfl_app.data.arrays import Array, from_arrays
from ssfl_app.data.cache import ArrayDataset, Wanted, cached
from ssfl_app.data.image_folder import Left, hidden, image_folder
from ssfl_app.data.unreadable import check_regular, is_folder, not_installed, refused, unreadable

_ENDINGS = (".nii", ".nii.gz")


def read_volumes(path: str, root: Path, image_size: int, wanted: Wanted) -> ArrayDataset:
    """Read <part>/images/* and <part>/masks/* of the same names, or <part>/<class>/*, of the parts train and test."""
    folders = [root / part for part in ("train", "test")]
    if wanted.test_only and not is_folder(path, folders[0], "train"):
        folders[0] = folders[1]
    for folder in folders:
        if not is_folder(path, folder, folder.name):
            rule = "it has <part>/images and <part>/masks, or <part>/<class>, for the parts train and test"
            raise unreadable(path, f"{folder.name} is missing; {rule}")
    masks = [is_folder(path, folder / "masks", "masks") for folder in folders]
    if masks[0] != masks[1]:
        raise unreadable(path, "one of train and test has masks; both have, or none")
    names = wanted.classes
    parts: list[list[tuple[Path, int | Path]]] = []
    for folder in folders:
        if masks[0]:
            parts.append([(file, folder / "masks" / file.name) for file in _files(path, folder)])
        else:
            found, names = image_folder(path, folder, names, Left(), _ENDINGS)
            parts.append(list(found))

    def read() -> ArrayDataset:
        made = [_part(path, folder.name, part) for folder, part in zip(folders, parts, strict=True)]
        mean = made[0][0].mean(dtype=np.float64)
        std = np.sqrt(np.mean([np.square(volume - mean).mean() for volume in made[0][0]])) or 1.0
        for x, _ in made:
            np.divide(np.subtract(x, mean, out=x, casting="unsafe"), std, out=x, casting="unsafe")
        return from_arrays(made, "volumes", names)

    files = [file for part in parts for pair in part for file in pair if isinstance(file, Path)]
    return cached(("volumes", str(root.resolve()), *names), files, read)


def _files(path: str, folder: Path) -> list[Path]:
    try:
        files = sorted((folder / "images").iterdir())
    except OSError as error:
        raise refused(path, f"{folder.name}/images", f"{folder.name}/images", "cannot be read", error) from error
    return [file for file in files if file.name.lower().endswith(_ENDINGS) and not hidden(file.name)]


def _part(path: str, part: str, files: list[tuple[Path, int | Path]]) -> tuple[Array, Array]:
    """Return the volumes of a part, float32 (N, C, D, H, W), and classes (N,) or masks (N, D, H, W)."""
    x: Array | None = None
    y: list[Any] = []
    for index, (file, target) in enumerate(files):
        volume = _load(path, file, f"volume {index} of {part}", x)
        x = np.empty((len(files), *volume.shape), np.float32) if x is None else x
        x[index] = volume
        y.append(
            _load(path, target, f"mask {index} of {part}", volume[None, :1])[0]
            if isinstance(target, Path)
            else target
        )
    if x is None:
        raise unreadable(path, f"{part} has no volume ({', '.join(_ENDINGS)})")
    targets = np.array(y)
    if (targets != np.rint(targets)).any() or targets.min() < 0:
        raise unreadable(path, f"a mask of {part} has other values than classes, whole numbers from 0")
    return x, targets.astype(np.int64)


def _load(path: str, file: Path, public: str, like: Array | None) -> Array:
    """Return a file's values, float32 (C, D, H, W), of the shape of those that are there, `like` (N, C, D, H, W)."""
    try:
        import nibabel as nib
    except ImportError as error:
        raise not_installed("volumes", "nibabel") from error
    name = f"{file.relative_to(Path(path).expanduser())}"
    check_regular(path, file, name, public)
    try:
        image = nib.as_closest_canonical(nib.load(file))  # type: ignore[no-untyped-call]
        values = np.asarray(image.dataobj, dtype=np.float32)
    except Exception as error:  # of a broken file nibabel, zlib and NumPy raise almost anything
        raise refused(path, name, public, "cannot be read as NIfTI", error) from error
    values = (values[..., None] if values.ndim == 3 else values).T
    if values.ndim != 4 or not np.isfinite(values).all():
        raise refused(path, name, public, "has other than 3 axes, or 4 with channels, or values that are not finite")
    if like is not None and values.shape != like.shape[1:]:
        shapes = ["x".join(map(str, shape)) for shape in (values.shape, like.shape[1:])]
        raise refused(path, name, public, f"has {shapes[0]} values, others have {shapes[1]}: bring all to one grid")
    return values
