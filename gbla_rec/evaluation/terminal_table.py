"""Tables for a terminal of a given width: more columns than fit go on in further tables, so that no number is cut."""

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

BORDER, PADDING_AND_BORDER = 1, 3
"""Letters at the left of a table, and beside the cells of each column."""


def fitted_tables(
    columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Text]]], *, label: str, width: int, title: str, caption: str
) -> Iterator[Table]:
    """As few tables as fit, each with all rows and some of the columns; a cell takes several lines rather than lose a letter.

    Args:
        columns: names of the columns beside the first, at least one.
        rows: what the first column says, and the cells of ``columns``.
        label: name of the first column.
        width: letters of a line; what is too narrow for one column beside the first is not fitted.
        title: above the first table.
        caption: below the last one.
    """
    cells = [cell.plain for _, values in rows for cell in values]
    # a cell is broken between words alone
    least = max((len(word) for cell in cells for word in cell.split()), default=1)
    longest = max((len(line) for line in (*cells, *columns)), default=1)
    label_width = max(len(label), *(len(name) for name, _ in rows)) if rows else len(label)
    room = width - BORDER - label_width - PADDING_AND_BORDER
    num_tables = -(-len(columns) // max(1, room // (least + PADDING_AND_BORDER)))
    per_table = -(-len(columns) // num_tables)
    column_width = max(least, min(longest, room // per_table - PADDING_AND_BORDER))
    is_broken = any(len(cell) > column_width for cell in cells)
    for start in range(0, len(columns), per_table):
        is_last = start + per_table >= len(columns)
        table = Table(title=None if start else title, caption=caption if is_last else None, show_lines=is_broken)
        table.add_column(label, width=label_width)
        for name in columns[start : start + per_table]:
            table.add_column(Text(name), justify="right", width=column_width, overflow="fold")
        for name, values in rows:
            table.add_row(Text(name), *values[start : start + per_table])
        yield table
