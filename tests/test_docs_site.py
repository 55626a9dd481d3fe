"""The docs site is whole: each page is in the nav, each link leads somewhere, and nothing comes from elsewhere."""

import re
import runpy
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import ssfl_app
from ssfl_app.config import defaults

ROOT = Path(__file__).parents[1]
SETTINGS = (ROOT / "zensical.toml").read_text("utf-8")
GENERATED = {"docs/reference/keys.md", "docs/reference/command-line.md"}


class Page(HTMLParser):
    """The links of a page, what it loads, and its anchors."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors = {""}
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        self.loads += [found[name] for name in ("src", "href") if name in found and tag != "a"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build it in a folder of its own, as `make docs` does."""
    folder = tmp_path_factory.mktemp("docs")
    runpy.run_path(str(ROOT / "docs" / "lay_out.py"))["lay_out"](folder / "build" / "docs")
    (folder / "zensical.toml").write_text(SETTINGS.replace('paths = ["."]', f'paths = ["{ROOT}"]'), "utf-8")
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "griffe" not in done.stdout + done.stderr  # a docstring that cannot be read
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {file: Page(file) for file in site.rglob("*.html")}


def in_nav(entries: Any) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    each = entries.values() if isinstance(entries, dict) else entries
    return [page for entry in each for page in in_nav(entry)]


def test_every_page_of_docs_is_in_the_nav_once() -> None:
    named = in_nav(tomllib.loads(SETTINGS)["project"]["nav"])
    there = {page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert len(named) == len(set(named))
    assert {page for page in named if page.startswith("docs/")} == there | GENERATED
    assert all((ROOT / page).exists() for page in set(named) - GENERATED)


def test_every_link_and_anchor_of_the_site_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for file, page in pages.items():
        if file.name == "404.html":  # is shown at any address
            continue
        for link in page.links + page.loads:
            path, _, anchor = unquote(link).partition("#")
            if re.match(r"[a-z]+:", path):
                continue
            target = (file.parent / path).resolve() if path else file
            target = target / "index.html" if target.is_dir() else target
            known = pages.get(target)
            if not target.is_file() or (anchor and known and anchor not in known.anchors):
                broken.append(f"{file.relative_to(site)}: {link}")
    assert broken == []


def markdown_in(page: str) -> list[str]:
    """Return the lines of a page's article that are Markdown still."""
    _, opened, rest = page.partition("<article")
    text, closed, _ = rest.partition("</article>")
    assert opened, "a page without <article"
    assert closed, "a page without </article>"
    text = re.sub(r"<(pre|code)\b.*?</\1>", "", text, flags=re.DOTALL)
    return re.findall(r"^(?:[-*] |\d+\. |#+ ).*|.*```.*|.*\|---.*", re.sub(r"<[^>]+>", "", text), re.MULTILINE)


def test_no_markdown_is_left_over(pages: dict[Path, Page]) -> None:
    """Python-Markdown knows no list without an empty line before it, nor a block indented by three spaces."""
    found = {str(file): lines for file in pages if (lines := markdown_in(file.read_text("utf-8")))}
    assert found == {}


def test_markdown_is_looked_for_in_an_article_that_is_there() -> None:
    assert markdown_in("<article>\n<p>\n- a list\n</p><pre>\n- code</pre>\n</article>") == ["- a list"]
    for page in ("<main>\n- a list\n</main>", "<article>\n- a list\n"):
        with pytest.raises(AssertionError, match="a page without <"):
            markdown_in(page)


def test_no_page_loads_anything_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert [load for page in pages.values() for load in page.loads if "//" in load] == []
    styles = "".join(file.read_text("utf-8") for file in site.rglob("*.css"))
    assert not re.search(r"url\([\"']?(?:https?:)?//", styles)


def test_keys_commands_and_names_are_in_the_reference(site: Path, pages: dict[Path, Page]) -> None:
    reference = site / "docs" / "reference"
    keys = (reference / "keys.html").read_text("utf-8")
    assert [key for key in defaults() if key != "strategy" and f"<code>{key}</code>" not in keys] == []
    assert {"ssfl-run", "ssfl-federation-up", "ssfl-study-masks"} <= pages[reference / "command-line.html"].anchors
    last = {anchor.rpartition(".")[2] for anchor in pages[reference / "api.html"].anchors}
    assert set(ssfl_app.__all__) <= last
