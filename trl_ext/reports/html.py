"""
The pieces of an HTML page that needs no network: every text is escaped, and pictures are in the page itself.
"""

import base64
import html
import re
from collections.abc import Iterable, Sequence


# Characters that HTML doesn't allow, escaped or not
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# The browser loads and runs nothing, even if something slipped through
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 78rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.4rem; border-bottom: 1px solid #ddd; } h3 { margin: 1.4rem 0 0.4rem; }
table { border-collapse: collapse; margin: 0.6rem 0; }
th, td { text-align: left; vertical-align: top; padding: 0.25rem 0.9rem 0.25rem 0; border-bottom: 1px solid #eee; }
th { font-weight: 600; } td { overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f7f9; padding: 0.6rem; margin: 0.2rem 0;
      max-height: 24rem; overflow-y: auto; font: 13px/1.45 ui-monospace, monospace; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0.2rem 1rem; margin: 0.5rem 0 1.4rem; }
.wide { grid-column: 1 / 3; } .note { color: #666; } .good { color: #00694c; } .bad { color: #a84300; }
"""


def escaped(text: object) -> str:
    """A text as HTML shows it, in an element or an attribute."""
    return html.escape(_CONTROL.sub("\ufffd", str(text)), quote=True)


def element(name: str, content: str, kind: str = "") -> str:
    """An element around HTML."""
    return f"<{name}{f' class={kind!r}' if kind else ''}>{content}</{name}>"


def paragraph(text: object, kind: str = "") -> str:
    """A paragraph of plain text."""
    return element("p", escaped(text), kind)


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table of plain texts, the first column of which names the rows."""
    lines = [element("tr", "".join(element("th", escaped(cell)) for cell in header))] if any(header) else []
    for first, *others in rows:
        cells = "".join(element("td", escaped(cell)) for cell in others)
        lines.append(element("tr", element("th", escaped(first)) + cells))
    return element("table", "\n".join(lines))


def picture(png: bytes, what: str) -> str:
    """A PNG, with words for those who don't see it."""
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{escaped(what)}" src="data:image/png;base64,{data}">'


def side_by_side(above: str, left: str, right: str) -> str:
    """Two pieces of HTML beside each other, under a third."""
    parts = (element("div", above, "wide"), element("div", left), element("div", right))
    return element("div", "\n".join(parts), "pair")


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page of pieces of HTML."""
    head = (
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width">',
        element("title", escaped(title)),
        element("style", _STYLE),
    )
    body = element("body", "\n".join((element("h1", escaped(title)), *parts)))
    return f'<!doctype html>\n<html lang="en">\n{element("head", chr(10).join(head))}\n{body}\n</html>\n'
