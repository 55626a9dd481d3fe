"""The snippets of docs/plugin.md run, one after the other, as a reader would type them."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "plugin.md"


def test_the_snippets_of_the_page_run() -> None:
    text = PAGE.read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(snippets) == text.count("```python") == 8
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)
    used = {"SSFL", "TopK", "SparseMod", "sparse_mod", "sparse_numpy_mod", "mask_gradients"}
    assert used <= set(names)


def test_every_argument_of_ssfl_is_on_the_page() -> None:
    import inspect

    from ssfl_app import SSFL, TopK

    text = PAGE.read_text()
    for name, parameter in [*inspect.signature(SSFL).parameters.items(), *inspect.signature(TopK).parameters.items()]:
        if parameter.kind is not parameter.VAR_KEYWORD:
            assert f"`{name}`" in text, name
