"""Results as short tables: HTML on a page, columns of text anywhere else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from tabulate import tabulate


class Table:
    """What :func:`table` makes; the last line of a cell shows it."""

    def __init__(self, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        numbers = [all(re.match(r"[-\d]", row[i]) for row in rows) for i in range(len(headers))]
        self._arguments: dict[str, Any] = {
            "tabular_data": rows,
            "headers": headers,
            "disable_numparse": True,
            "colalign": ["right" if number else "left" for number in numbers],
        }

    def __repr__(self) -> str:
        return str(tabulate(**self._arguments, tablefmt="simple"))

    def _repr_html_(self) -> str:
        html = str(tabulate(**self._arguments, tablefmt="html"))
        html = re.sub(r"(?<=>)\s+|\s+(?=</t[dh]>)", "", html)
        html = re.sub(r"<th[^>]*></th>", "<td></td>", html)  # nothing is the head of its column
        html = re.sub(r"<th(?=[ >])", '<th scope="col"', html)
        return html.replace("<table>", '<table class="table results">', 1)


def table(
    headers: Sequence[str], rows: Sequence[Sequence[Any]], *, digits: str | Sequence[str] = ".3f"
) -> Table:
    """Return a table of results, which the last line of a cell shows.

    Args:
        headers: a name for every column; short, for a page of 375 pixels holds some 40 characters.
        rows: the values, row by row: numbers, or text, which is shown as it is.
        digits: how numbers with a decimal point are written, for all columns or one for each, as
            in the built-in ``format``.

    Raises:
        ValueError: a row, or ``digits``, has not one entry for each header.

    Used in every chapter.

    Examples:
        >>> table(["over", "mean", "of"], [["N H W", 0.25, 8], ["H W", 0.5, 4]], digits=".2f")
        over      mean    of
        ------  ------  ----
        N H W     0.25     8
        H W       0.50     4
    """
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(
                f"expected {len(headers)} values in a row, one for each header, got {row}"
            )
    each = [digits] * len(headers) if isinstance(digits, str) else digits
    if len(each) != len(headers):
        raise ValueError(f"expected digits for {len(headers)} columns, got {digits!r}")

    def written(value: Any, how: str) -> str:
        return format(value, how) if isinstance(value, float | np.floating) else str(value)

    return Table(headers, [list(map(written, row, each)) for row in rows])
