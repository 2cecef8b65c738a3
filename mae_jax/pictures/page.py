"""A page of text, tables and pictures, as HTML that needs no other file and as Markdown."""

import base64
import html
import io
import re
from collections.abc import Sequence

from etils import epath
from PIL import Image

from mae_jax.storage.files import write_atomically

WIDEST = 900  # pixels of a picture on the page
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em }
h2 { border-bottom: 1px solid #ccc; margin-top: 2em } figure { margin: 1em 0 }
img { max-width: 100% } figcaption { color: #555; font-size: 90% } div { overflow-x: auto }
table { border-collapse: collapse; font-size: 90%; margin: 1em 0 } pre { font-size: 85% }
th, td { padding: .3em .7em; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left } th { background: #f4f4f4 }
"""


class Page:
    """Parts in order, written as one HTML file and as Markdown with PNG files."""

    def __init__(self, title: str):
        self._title, self._files = title, {}
        self._html, self._markdown = [f"<h1>{html.escape(title)}</h1>"], [f"# {title}"]

    def heading(self, text: str, level: int = 2) -> None:
        """A heading."""
        self._html.append(f"<h{level}>{html.escape(text)}</h{level}>")
        self._markdown.append(f"{'#' * level} {text}")

    def text(self, text: str, verbatim: bool = False) -> None:
        """A paragraph, or lines as they are."""
        tag, fence = ("pre", "```\n") if verbatim else ("p", "")
        self._html.append(f"<{tag}>{html.escape(text)}</{tag}>")
        self._markdown.append(f"{fence}{text}{fence and chr(10) + '```'}")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; nothing where it has no rows."""
        if rows:
            lines = [
                "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
                for tag, cells in [("th", head), *(("td", row) for row in rows)]
            ]
            self._html.append(f"<div><table>{''.join(lines)}</table></div>")
            cells = [[cell.replace("|", r"\|") for cell in row] for row in (head, *rows)]
            cells.insert(1, ["---"] * len(head))
            self._markdown.append("\n".join(f"| {' | '.join(row)} |" for row in cells))

    def picture(self, name: str, content: bytes, caption: str = "") -> None:
        """The content of a PNG file, to be called `name`.png."""
        name = re.sub(r"[^\w.-]+", "_", name) + ".png"
        self._files[name] = content
        source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        shown = f"<figcaption>{html.escape(caption)}</figcaption>" * bool(caption)
        alt = html.escape(caption or name, quote=True)
        self._html.append(f'<figure><img alt="{alt}" src="{source}">{shown}</figure>')
        self._markdown.append(f"![{caption or name}]({name})")

    def write(self, folder: epath.Path) -> None:
        """Writes all files."""
        for name, content in self._files.items():
            write_atomically(folder / name, content)
        write_atomically(folder / "report.md", "\n\n".join(self._markdown) + "\n")
        title, body = html.escape(self._title), "\n".join(self._html)
        head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        page = (
            f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
        )
        write_atomically(folder / "index.html", page)


def newest_picture(folder: epath.Path) -> bytes | None:
    """The last step's picture of a folder, not wider than a page."""
    files = sorted(folder.glob("step_*.png")) if folder.exists() else []
    return smaller(files[-1]) if files else None


def smaller(path: epath.Path) -> bytes:
    """A picture as a PNG file that is not wider than the page."""
    picture, content = Image.open(io.BytesIO(path.read_bytes())), io.BytesIO()
    picture.thumbnail((WIDEST, 100 * WIDEST))
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()
