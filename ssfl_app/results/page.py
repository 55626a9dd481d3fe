"""The page of the HTML report: its template and its style.

The template is a Python string because a Flower app bundle carries only ``*.py`` files.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from ssfl_app.results.table import Table
from ssfl_app.text import printable

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --page: #f6f8fa;
  --card: #ffffff; --mark: #0072b2; --warn: #a04000; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #30363d;
  --page: #0d1117; --card: #161b22; --mark: #58a6ff; --warn: #f0883e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; }
p.soft, figcaption, .note { color: var(--soft); margin: 0; }
.warn { color: var(--warn); font-weight: 600; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 4px 16px;
  overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 8px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tr:last-child td, tr:last-child th { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; }
tbody th:not(.number) { min-width: 8em; }
.number { text-align: right; }
td.number { white-space: nowrap; }
.pairs th { width: 34%; overflow-wrap: anywhere; font-weight: 400; color: var(--soft); }
.pairs td { overflow-wrap: anywhere; }
figure { margin: 0 0 18px; }
figure div { background: #ffffff; border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { font-size: 13.5px; padding: 6px 4px 0; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--mark); padding: 6px 0; }
@media print { body { background: #ffffff; } figure, tr { break-inside: avoid; } }
"""

# The policy lets a browser load nothing from outside the file, whatever a run folder held.
TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>
{% for line in warnings %}
<p class="warn">{{ line }}</p>
{% endfor %}
</header>
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% for image in section.images %}
<figure>{% if image.uri %}<div><img src="{{ image.uri }}" alt="{{ image.caption }}"></div>{% endif %}

<figcaption>{{ image.caption }}</figcaption></figure>
{% endfor %}
{% if section.note %}
<p class="note">{{ section.note }}</p>
{% endif %}
{% if section.table %}
{% if section.folded %}
<details><summary>{{ section.folded }}</summary>
{{ section.table.html() }}
</details>
{% else %}
{{ section.table.html() }}
{% endif %}
{% endif %}
</section>
{% endfor %}
</main>
</body>
</html>
"""


def section(
    title: str,
    *,
    content: Table | None = None,
    note: str = "",
    images: Sequence[dict[str, str]] = (),
    folded: str = "",
) -> dict[str, Any]:
    """Return one section; a table with a `folded` line stays closed until the reader opens it."""
    return {"title": title, "table": content, "note": note, "images": images, "folded": folded}


def render(context: Mapping[str, Any]) -> str:
    """Return the page; `context` has title, subtitle, warnings and sections. All text is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value, keep="\n") if type(value) is str else value,
    )
    return environment.from_string(TEMPLATE).render(**context, style=Markup(STYLE))


def data_uri(svg: bytes) -> str:
    """Return an SVG file as an address that holds it."""
    # A picture as a data URI keeps its ids to itself; inlined SVGs would share theirs.
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
