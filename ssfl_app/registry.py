"""Finds what the configuration names: built in, an entry point of an installed package, or ``"module:attribute"``.

What is named must be importable where it runs. In simulation the folder in which the user stands is
(`import_from`); a real node imports from the Flower app that it was sent.
"""

import ast
import functools
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from ssfl_app.options import PrivateError, option
from ssfl_app.text import one_line

T = TypeVar("T")
FOLDER = "SSFL_MODULES"
"""Environment variable: the folder whose modules may be named, beside those that are installed."""


def import_from(folder: Path) -> None:
    """Let this process, and those that it starts, import what is in a folder, after all that is installed."""
    os.environ[FOLDER] = str(folder)


_HERE = sys.modules["this_process"] = ModuleType("this_process", "What `name_of` keeps.")


def name_of(thing: object, word: str = "") -> str:
    """Return "module:attribute" of a function or class, for the configuration.

    One that no module holds, since it was made inside a function, is kept by this process, called `word` or as it is.
    """
    module, name = getattr(thing, "__module__", "") or "", getattr(thing, "__qualname__", type(thing).__name__)
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is thing:
        return f"{module}:{name}"
    word = word or re.sub(r"\W", "", name.rpartition(".")[2])
    held = vars(_HERE)
    free = (f"{word}_{number}" for number in range(1, len(held) + 2))
    name = next(name for name in free if held.get(name, thing) is thing)
    held[name] = thing
    return f"{_HERE.__name__}:{name}"


def here_only(name: str) -> bool:
    """Return whether a name stands for something that this process alone has, and its forks."""
    return name.partition(":")[0] in ("__main__", _HERE.__name__)


class Unknown(PrivateError, LookupError):
    """A name that stands for nothing here; the text completes ``"model.name is 'x'; "``."""


class Registry(dict[str, T]):
    """Built-in things by name; ``registry[name]`` also finds entry points and ``"module:attribute"``.

    Parameters
    ----------
    group : str
        Of entry points, ``"ssfl.models"``.
    builtin : mapping
        Name -> thing. Only these are listed and counted.
    what : str
        Completes "it is ...", about a thing that does not fit.
    fits : callable
        Says whether a foreign thing is one of this kind.

    Raises
    ------
    Unknown
        By ``registry[name]``: it is not there, cannot be imported, or is of another kind.
    """

    def __init__(self, group: str, builtin: Mapping[str, T], what: str, fits: Callable[[Any], bool]) -> None:
        super().__init__(builtin)
        self.group, self.what, self.fits = group, what, fits

    def __missing__(self, name: str) -> T:
        address = self._address(name)
        module, _, attribute = address.partition(":")
        if address == name:
            _check_brought(module)
        found: Any = _imported(module)
        for part in attribute.split("."):
            if not hasattr(found, part):
                where = f" ({file})" if (file := getattr(found, "__file__", None)) else ""
                lost = "; it was made by the process that began the run" if here_only(module) else ""
                public = f"module {module} has no {attribute}{lost}"
                raise _unknown(f"module {module}{where} has no {attribute}{lost}", public)
            found = getattr(found, part)
            if isinstance(found, ModuleType):
                raise _unknown(f"{part} is a module; what is in it is named by its own module")
        if address == name:
            _check_brought(str(getattr(found, "__module__", None) or module))
        if not self.fits(found):
            raise _unknown(f"this is {type(found).__name__} {attribute}; it is {self.what}")
        return found  # type: ignore[no-any-return]

    def _address(self, name: str) -> str:
        """Return ``"module:attribute"`` of a foreign thing."""
        dotted = all(part.isidentifier() for word in name.split(":") for part in word.split("."))
        if dotted and name.count(":") == 1:
            return name
        entries = _entry_points(self.group)
        if name in entries:
            return entries[name]
        known = [*self, *entries]
        module, _, attribute = name.rpartition(".")
        meant = [f"{module}:{attribute}"] if dotted and module and attribute != "py" else []
        near = get_close_matches(name, known, 1, 0.6) or meant
        hint = f"; did you mean {near[0]}?" if near else ""
        raise _unknown(f'it is one of {", ".join(known)}, or "module:attribute"{hint}')

    def module_of(self, name: str) -> str:
        """Return the module of a foreign thing, "" for a built-in one."""
        return "" if name in self else self._address(name).partition(":")[0]

    def field(self, default: str, about: str = "", *more: str) -> Any:
        """Return a dataclass field for the name of one of these things, or one of the words `more`."""
        names = [*more, *self, '"module:attribute"']

        def check(name: str) -> bool:
            return name in more or self[name] is not None

        return option("one of " + ", ".join(names), check, default, about, names)


def _unknown(text: str, public: str = "") -> Unknown:
    return Unknown(text, public or text)


@functools.cache
def _entry_points(group: str) -> dict[str, str]:
    return {entry.name: entry.value.partition("[")[0].strip() for entry in metadata.entry_points(group=group)}


@contextmanager
def only_brought(wanted: bool) -> Iterator[None]:
    """Where it is `wanted` let names stand only for what the Flower app brought, built in or entry points, inside.

    A node obeys a server's names, and what is installed on it holds functions that delete and run things.
    """
    token = _ONLY_BROUGHT.set(wanted)
    try:
        yield
    finally:
        _ONLY_BROUGHT.reset(token)


_ONLY_BROUGHT: ContextVar[bool] = ContextVar("only_brought", default=False)


def _check_brought(module: str) -> None:
    """Raise Unknown if the module is installed here, or this package, and only those of the app may be named."""
    top = module.partition(".")[0]
    if not _ONLY_BROUGHT.get() or top == "flwr_datasets":  # its partitioners read no files
        return
    spec = None if top in sys.stdlib_module_names else importlib.util.find_spec(top)
    places = [*(spec.submodule_search_locations or []), spec.origin or ""] if spec else []
    installed = {"site-packages", "dist-packages"}
    if top in {*sys.stdlib_module_names, "ssfl_app"} or any(installed & set(Path(place).parts) for place in places):
        rule = "a name stands for what the Flower app brought, or an entry point"
        raise _unknown(f"{top} is installed on this node; {rule}")


def _folder() -> str:
    """Return the folder whose modules may be named, which this process then imports from; "": none."""
    folder = os.environ.get(FOLDER, "")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    return folder


def _imported(module: str) -> Any:
    folder = _folder()
    try:
        return importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            where = f" in {folder} or" if folder else ""
            rule = "; a module is named without .py" if module.endswith(".py") else ""
            public = f"there is no module {error.name} where it runs{rule}"
            raise _unknown(f"there is no module {error.name}{where} among those installed{rule}", public) from error
        said = f"module {module} cannot be imported"
        raise _unknown(f"{said} ({one_line(error)})", f"{said} ({type(error).__name__})") from error


def sources(module: str, found: dict[str, Path] | None = None) -> dict[str, Path]:
    """Return the files of a foreign module by their names below its folder: what server and clients must share.

    They are all files of its package, or the module, and what those import of the same folder, in turn, with `found`.
    """
    _folder()
    found, top = {} if found is None else found, module.partition(".")[0]
    spec = None if here_only(top) else importlib.util.find_spec(top)
    parts = [Path(part) for part in (spec and spec.submodule_search_locations) or ()]  # without an __init__.py too
    own = {path: part.parent for part in parts for path in sorted(part.rglob("*.py"))}
    if spec is not None and spec.has_location and not parts:
        own = {Path(str(spec.origin)): Path(str(spec.origin)).parent}
    found |= {path.relative_to(folder).as_posix(): path for path, folder in own.items()}
    for path, folder in own.items():
        for name in _imports(path) if "site-packages" not in path.parts else ():
            known = any(key.startswith((f"{name}.py", f"{name}/")) for key in found)
            if not known and any((folder / there).exists() for there in (f"{name}.py", f"{name}/__init__.py")):
                found = sources(name, found)
    return found


def _imports(file: Path) -> set[str]:
    """Return the packages and modules that a file names in its imports, but for this package and its own."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError):  # in a package lie templates, and files of other versions of Python
        return set()
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.partition(".")[0] for name in names} - {"ssfl_app", ""}
