"""Lay out what the docs site is built of, in build/docs: the pages, the files that they link to, and the reference.

`make docs` runs it, then Zensical, which `zensical.toml` tells the order of the pages. The tree is the repository's,
so that links are as they are on the pages, also those that lead out of docs/. Keys and command line are written here,
from the fields of the options and from typer; what stands in docs/reference/api.md comes from the docstrings.
"""

import re
import shutil
from pathlib import Path

import click
from typer.cli import get_docs_for_click
from typer.main import get_command

from ssfl_app.cli.main import app
from ssfl_app.config import keys as every_key
from ssfl_app.config import meaning as meaning_of

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "docs"
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)")
START = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")


def lay_out(site: Path) -> None:
    """Write the whole tree; what was there goes."""
    shutil.rmtree(site, ignore_errors=True)
    todo = [*(ROOT / name for name in START), *sorted((ROOT / "docs").rglob("*.md"))]
    done: set[Path] = set()
    while todo:
        file = todo.pop().resolve()
        if file in done:
            continue
        done.add(file)
        into = site / file.relative_to(ROOT)
        into.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix != ".md":
            shutil.copy(file, into)
            continue
        text = for_the_web(file)
        into.write_text(text, "utf-8")
        todo += [file.parent / link for link in LINK.findall(text)]
    reference = site / "docs" / "reference"
    reference.mkdir(exist_ok=True)
    (reference / "keys.md").write_text(keys(), "utf-8")
    (reference / "command-line.md").write_text(command_line(), "utf-8")


def for_the_web(page: Path) -> str:
    """Return a page as Python-Markdown and browsers want it; all else about it is as GitHub shows it.

    A file name after the language of a block becomes its title, what stands below an item of a list is indented by
    four spaces, and a link to a folder leads to the README in it.
    """
    blocks = re.split(r"(^```.*?^```$)", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for at, block in enumerate(blocks):
        if at % 2:
            blocks[at] = re.sub(r"^```(\w+) (\S+)$", r'```\1 title="\2"', block, flags=re.MULTILINE)
            continue
        block = re.sub(r"^ {2,3}(?=\S)", "    ", block, flags=re.MULTILINE)
        blocks[at] = LINK.sub(lambda link: link[1] + "/README.md" * (page.parent / link[1]).is_dir(), block)
    return "".join(blocks)


def keys() -> str:
    """Return the page of all keys, a table a section."""
    lines = ["# Keys of the configuration", "", "Made of the fields of the options. `ssfl keys` prints the same, "]
    lines[-1] += "`ssfl keys STRATEGY` what one reads. `strategy` stands above the sections; its default is `ssfl`."
    section = ""
    for key, field in every_key():
        before, section = section, key.partition(".")[0]
        if section != before:
            lines += ["", f"## {section}", "", "| key | default | meaning |", "|---|---|---|"]
        meaning = meaning_of(field).replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{key}` | `{field.default!r}` | {meaning} |")
    return "\n".join(lines) + "\n"


def command_line() -> str:
    """Return the page of all commands, as typer writes it, without those that only processes of ours call."""
    command = get_command(app)
    for group in (command, *command.commands.values()):
        if isinstance(group, click.Group):
            group.commands = {name: each for name, each in group.commands.items() if not each.hidden}
    with click.Context(command, info_name="ssfl") as context:
        return get_docs_for_click(obj=command, ctx=context, name="ssfl", title="The command line")


if __name__ == "__main__":
    lay_out(SITE)
