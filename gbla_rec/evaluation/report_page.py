"""A page of headings, text, tables and figures, as Markdown and as one HTML file that needs no other."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gbla_rec.checkpoint.run_directory import write_text
from gbla_rec.evaluation.output_directory import output_directory
from gbla_rec.evaluation.table import markdown_table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; } img { max-width: 100%; } figcaption { color: #555; font-size: 13px; }
"""


@dataclass(frozen=True)
class Heading:
    """``level`` 2 or 3; the title of the page is level 1."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class TextTable:
    """Cells are plain text; all columns but the first are aligned to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """``svg`` is a whole SVG file; ``name`` is that of the file beside the Markdown."""

    name: str
    svg: str
    caption: str


Block = Heading | Paragraph | TextTable | Figure


@dataclass(frozen=True)
class Page:
    """A title and what follows."""

    title: str
    blocks: Sequence[Block]

    def write(self, directory: Path) -> tuple[Path, Path]:
        """Write ``report.html``, whole in itself, and ``report.md`` with its figures beside it; each file is complete or absent.

        Returns:
            The Markdown and the HTML file.

        Raises:
            OSError: if ``directory`` cannot be made or written; names it and the cure.
        """
        paths = directory / "report.md", directory / "report.html"
        with output_directory(directory):
            for block in self.blocks:
                if isinstance(block, Figure):
                    write_text(directory / f"{block.name}.svg", block.svg)
            write_text(paths[0], self.markdown())
            write_text(paths[1], self.html())
        return paths

    def markdown(self) -> str:
        """The page with links to the figures."""
        return "\n\n".join([f"# {self.title}", *(_markdown(block).rstrip("\n") for block in self.blocks)]) + "\n"

    def html(self) -> str:
        """The page with its style and figures inside."""
        title = html.escape(self.title)
        body = "\n".join(_html(block) for block in self.blocks)
        return (
            f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n'
            f"<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
        )


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case TextTable(columns, rows):
            return markdown_table(list(columns), [[cell.replace("|", "\\|") for cell in row] for row in rows])
        case Figure(name, _, caption):
            return f"![{caption}]({name}.svg)\n\n{caption}"


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case TextTable(columns, rows):
            head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
            body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
        case Figure(_, svg, caption):
            # an image, not inline: the ids of two SVGs in one document would collide
            data, text = base64.b64encode(svg.encode()).decode(), html.escape(caption, quote=True)
            return f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'
