"""Data sets in memory.

Examples
--------
>>> digits = load(DataOptions("digits"))
>>> len(digits.train), len(digits.test), digits.shape, digits.classes
(1437, 360, (1, 8, 8), 10)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ssfl_app.data.arrays import Array, from_arrays
from ssfl_app.data.cache import ArrayDataset, Labels, Wanted
from ssfl_app.data.readers import FILES, OWN, READERS, read_files, unseen
from ssfl_app.data.summary import ALL, CLASS_NAME, DataSummary, odd_name
from ssfl_app.data.transform import AsTheyAre
from ssfl_app.data.transform import Transform as Transform
from ssfl_app.options import ConfigError, PrivateError, Scalar, anything, at_least, choice, free, option

MIRRORED = ("cifar10", "cifar100", "tiny-imagenet")
"""Data sets whose published training scripts crop and mirror."""

COLUMNS = ("table", "hf")
"""Data sets of columns that have names."""


@dataclass(frozen=True)
class DataOptions:
    """The section ``data`` of the configuration.

    With augment "auto" nothing is mirrored but `MIRRORED`. Nobody knows of other images whether their mirror images
    are the same things: digits, text and lungs are not.
    """

    name: str = READERS.field("digits", "what is learnt from")
    path: str = anything("a folder", "", "root of the data set; empty for digits")
    download: bool = anything(
        "true or false", False, "get cifar10, cifar100, tiny-imagenet into path; hf: path is a name on the hub"
    )
    image_size: int = at_least(0, 0, "resize to this many pixels a side (files of images); 0: as they are")
    augment: str = choice(
        "auto",
        "none",
        "crop-flip",
        about="auto: crop-flip for cifar10, cifar100 and tiny-imagenet, none for all else",
    )
    where: str = choice(
        "shared", "sites", about="one data set that is dealt, or each SuperNode's own (docs/own-data.md)"
    )
    classes: str = anything(
        "class names with commas between them, or empty",
        "",
        'sites: "cat,dog", all class names in order; empty: as found',
    )
    channels: int = option("0, 1 or 3", lambda value: value in (0, 1, 3), 0, "sites: 1 grey, 3 colour, 0: as found")
    label_column: str = option(
        "the name of a column", bool, "label", "parquet: the column of integers that says each image's class"
    )
    target: str = anything(
        "the name of a column", "", "table, hf: the column that is predicted; empty: next characters"
    )
    inputs: str = anything(
        "names of columns", "", 'table, hf: "age,weight", what it is predicted from; empty: the rest'
    )
    client: str = anything(
        "the name of a column", "", "table, hf: the column that says whose a sample is; empty: none"
    )
    length: int = at_least(1, 80, "text: characters of a sequence")
    options: Mapping[str, Scalar] = free("arguments of a reader of your own: data.options.year=2020")

    @property
    def named(self) -> tuple[str, ...]:
        """The names in `classes`."""
        return tuple(name.strip() for name in self.classes.split(",")) if self.classes else ()

    def check(self) -> None:
        """Raise ConfigError unless the options fit together."""
        of_columns = dict.fromkeys(("target", "inputs", "client"), COLUMNS)
        for key, names in {**of_columns, "length": (*COLUMNS, "text")}.items():
            if self.name not in names and getattr(self, key) != getattr(DataOptions, key):
                raise ConfigError(f"data.{key} is {getattr(self, key)!r}; it is for data.name {' and '.join(names)}")
        if self.options and self.name in READERS:
            raise ConfigError(f"data.options has {', '.join(self.options)}; data.name {self.name!r} takes none")
        if self.where == "shared":
            for key, value, none in (("classes", self.classes, ""), ("channels", self.channels, 0)):
                if value != none:
                    raise ConfigError(f"data.{key} is {value!r}; it is {none!r} with data.where 'shared'")
            return
        if self.name not in OWN:
            raise ConfigError(f"data.name is {self.name!r}; with data.where 'sites' it is one of {', '.join(OWN)}")
        if odd_name(self.named) is not None or not self.classes.isprintable():
            raise ConfigError(f"data.classes is {self.classes!r}; {CLASS_NAME}")


@dataclass(frozen=True)
class Samples:
    """What a model learns from.

    Attributes
    ----------
    inputs : tensor, shape (N, ...)
        Images are uint8, (N, C, H, W). May be pages of a file that several processes share: do not write to it.
    targets : tensor, shape (N, ...)
        Of images int64, (N,), their classes: 0 <= target < number of classes.
    """

    inputs: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.targets)

    @property
    def labels(self) -> torch.Tensor:
        """The class of each sample, int64, (N,); where targets are no classes, all are of class 0."""
        if self.targets.dtype == torch.int64 and self.targets.ndim == 1:
            return self.targets
        return torch.zeros(len(self), dtype=torch.int64, device=self.targets.device)

    def take(self, indices: npt.NDArray[np.int64]) -> "Samples":
        """Return a copy of the samples at `indices` (n,), in their order."""
        where = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64)).to(self.targets.device)
        return Samples(self.inputs[where], self.targets[where])

    def to(self, device: torch.device | str) -> "Samples":
        """Return the samples on `device`; the same tensors if they are there."""
        return Samples(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class DataSet:
    """A data set, how its inputs enter a network, and what a user should know of its files.

    Attributes
    ----------
    class_names : tuple of str
        Of targets that are no classes: `ALL` alone.
    outputs : int
        Values that a model gives for a target: classes, size of the vocabulary, width of a target.
    task : str
        What the data are for: a name of `ssfl_app.training.tasks`.
    owners : pair of int64 ndarray, shapes (N,) and (M,), or None
        The client that each training and test sample naturally belongs to.
    """

    name: str
    train: Samples
    test: Samples
    class_names: tuple[str, ...]
    transform: Transform | AsTheyAre
    notes: tuple[str, ...] = ()
    outputs: int = 0
    task: str = "classification"
    owners: tuple[Labels, Labels] | None = None

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an input; of images channels, height and width."""
        return tuple(self.train.inputs.shape[1:])

    @property
    def numbers(self) -> bool:
        """Whether a network gets its inputs as floating-point numbers, not as tokens."""
        return self.transform.test(self.train.inputs[:1]).is_floating_point()

    def to(self, device: torch.device) -> "DataSet":
        """Return the data set with its samples on `device`."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def holding(self, train: npt.NDArray[np.int64], test: npt.NDArray[np.int64]) -> DataSummary:
        """Return what a client with these indices of training and test samples holds."""
        counts = np.bincount(self.train.labels.cpu().numpy()[train], minlength=self.classes)
        return DataSummary(self.class_names, self.shape, tuple(map(int, counts)), len(test))


def load(options: DataOptions) -> DataSet:
    """Return a data set with its images on the CPU, the same on every machine.

    Raises
    ------
    ConfigError
        The data is not there or cannot be read; the message names ``data.path`` and what is allowed.
    """
    if options.name in FILES:
        return _own(options, options.path)
    if options.name in READERS:
        return _data_set(options, READERS[options.name](options.path, options.download, options.image_size))
    arguments = {key.replace("-", "_"): value for key, value in options.options.items()}
    try:
        raw = from_arrays(READERS[options.name](options.path, **arguments), options.name)
    except ConfigError:
        raise
    except Exception as error:  # of somebody else's code there may be any
        public = f"data.name is {options.name!r}; it says {type(error).__name__}"
        raise PrivateError(f"{public}: {error}", public) from error
    return _data_set(options, raw)


def load_own(options: DataOptions, path: str) -> DataSet:
    """Read the own data of the site at `path`; they are in the format `options.name`.

    Mean and standard deviation are measured on the site's own training images: no site tells another one's.

    Raises
    ------
    ConfigError
        The data cannot be read, or hold a class that `options.classes` does not name.
    """
    return _own(options, path)


def load_central(options: DataOptions) -> DataSet:
    """Return what the server of sites with their own data knows: its test images at `options.path`, if it has any.

    Without a path there are none. Mean and std are those of its training images if it has some, else of the others.

    Raises
    ------
    ConfigError
        The images cannot be read, or there is no path and classes, channels or image size are not named either.
    """
    if options.path:
        return _own(options, options.path, test_only=True)
    if options.name not in ("parquet", "folder"):
        raise ConfigError(
            f"data.path is ''; with data.where 'sites' and data.name {options.name!r} the server has a folder: its "
            "test samples say what goes into the model and comes out of it"
        )
    return _data_set(options, unseen(options.named, options.channels, options.image_size))


def _own(options: DataOptions, path: str, test_only: bool = False) -> DataSet:
    alone, inputs = options.where == "sites", tuple(filter(None, map(str.strip, options.inputs.split(","))))
    columns = (options.target, inputs, options.client, options.length)
    wanted = Wanted(options.label_column, options.named, options.channels, test_only, *columns, alone)
    raw = read_files(options.name, path, options.image_size, wanted, options.download)
    if alone and raw.task == "segmentation" and not options.classes:
        raise ConfigError("data.classes is ''; with data.where 'sites' it names the classes of masks, from 0 on")
    return _data_set(options, raw)


def _data_set(options: DataOptions, raw: ArrayDataset) -> DataSet:
    augment = options.augment
    if augment == "auto":
        augment = "crop-flip" if options.name in MIRRORED else "none"
    if augment != "none" and not raw.mean:
        raise ConfigError(f"data.augment is {augment!r}; {options.name} has no images, so it is 'none'")
    train, test = _samples(raw.train, raw.train_labels), _samples(raw.test, raw.test_labels)
    transform = Transform(raw.mean, raw.std, augment) if raw.mean else AsTheyAre()
    owners = None if raw.train_owners is None or raw.test_owners is None else (raw.train_owners, raw.test_owners)
    notes = raw.notes + _class_notes(options, raw)
    outputs = raw.outputs or len(raw.class_names)
    return DataSet(options.name, train, test, raw.class_names, transform, notes, outputs, raw.task, owners)


def _samples(inputs: Array, targets: Array) -> Samples:
    # Torch chooses its kernels by the strides, and NumPy may give an axis of length 1 any: grey images would be taken
    # for some that lie in memory channels last, for which kernels are slower and round differently.
    return Samples(torch.from_numpy(inputs).reshape(inputs.shape), torch.from_numpy(targets))


def _class_notes(options: DataOptions, raw: ArrayDataset) -> tuple[str, ...]:
    """Return what is odd about the classes of a data set that is dealt; a site may lack some."""
    if raw.class_names == ALL:
        return ()
    present, there = len(np.unique(raw.train_labels)), len(raw.class_names)
    if options.where != "shared" or present == there > 1:
        return ()
    return (
        f"{there - present} of {there} classes have no training image"
        if there > present
        else "there is one class only: each answer is right",
    )
