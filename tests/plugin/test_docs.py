"""docs/plugin.md names every argument. Its snippets run in tests/test_docs_pages.py."""

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "plugin.md"


def test_every_argument_of_ssfl_is_on_the_page() -> None:
    import inspect

    from ssfl_app import SSFL, TopK

    text = PAGE.read_text()
    for name, parameter in [*inspect.signature(SSFL).parameters.items(), *inspect.signature(TopK).parameters.items()]:
        if parameter.kind is not parameter.VAR_KEYWORD:
            assert f"`{name}`" in text, name
