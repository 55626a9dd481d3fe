"""One table, three renderers."""

import re

from ssfl_app.results.rows import compare_table
from ssfl_app.results.run_folder import read_run
from ssfl_app.results.table import NONE, Table
from tests.results.test_report import write_run

MADE = Table(["name", "the mean", "p"], [["`a`", "10.5", NONE], ["<b>", "9.25", "0.5"]], texts=1)


def test_markdown_is_aligned_and_writes_a_dash_for_no_value() -> None:
    assert MADE.markdown() == [
        "| name | the mean |   p |",
        "| ---- | -------: | --: |",
        "| `a`  |     10.5 |   \N{EN DASH} |",
        "| <b>  |     9.25 | 0.5 |",
    ]


def test_a_column_of_one_letter_has_a_rule_that_markdown_knows() -> None:
    """CommonMark's tables need a hyphen: the column p of a comparison without a test was none, nor the table."""
    assert Table(["a", "p"], [["x", NONE]], texts=1).markdown()[1] == "| -- | -: |"


def test_html_marks_numbers_and_escapes_every_cell() -> None:
    lines = str(MADE.html()).splitlines()
    assert lines[0] == '<div class="card"><table>'
    number = '<th class="number">the mean</th><th class="number">p</th>'
    assert lines[1] == f"<thead><tr><th>name</th>{number}</tr></thead>"
    assert (
        lines[4] == '<tr><th scope="row">&lt;b&gt;</th><td class="number">9.25</td><td class="number">0.5</td></tr>'
    )
    pairs = str(Table([], [["a\x1b", "b"]]).html())
    assert '<table class="pairs">' in pairs
    assert "<thead>" not in pairs
    assert r"a\x1b" in pairs


def test_the_terminal_has_two_words_of_a_number_on_two_lines_and_no_markup() -> None:
    lines = Table(["name", "the mean"], [["[red]", "10.5"], ["a\x1b", "9"]], texts=1).text().splitlines()
    assert [line.split() for line in lines if line and "─" not in line] == [
        ["the"],
        ["name", "mean"],
        ["[red]", "10.5"],
        [r"a\x1b", "9"],
    ]
    assert len({len(line) for line in lines if line and "─" not in line}) == 1  # right-aligned


def test_a_name_is_never_broken_and_a_long_text_is(tmp_path, monkeypatch) -> None:
    """`ssfl report` had names of more than about 20 letters in pieces, which cannot be copied."""
    monkeypatch.setenv("COLUMNS", "80")
    name = "2026-01-31-some-long-name-of-a-run-" + "x" * 80
    (row,) = (
        line for line in compare_table([read_run(write_run(tmp_path / name))]).text().splitlines() if name in line
    )
    assert re.split(" +", row.strip())[:3] == [name, "ssfl", "digits"]
    reason = " ".join(["word"] * 40)
    text = Table(["row", "state"], [["a", reason]]).text()
    assert " ".join(re.findall("word", text)) == reason
    assert max(map(len, text.splitlines())) < 70
