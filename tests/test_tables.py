"""Tables of results: what is written in a cell, and what a reader of the page meets."""

from __future__ import annotations

import numpy as np
import pytest
from bs4 import BeautifulSoup

from bnlib.book.tables import table


def test_a_table_has_heads_and_cells_and_nothing_else():
    rows = [["<b> & c", 1, 0.12345], ["x", -20, np.float32(2)]]
    shown = BeautifulSoup(table(["what", "n", "value"], rows)._repr_html_(), "html.parser")
    heads = shown.select("thead th")
    assert [h.get_text() for h in heads] == ["what", "n", "value"]
    assert all(h["scope"] == "col" for h in heads)
    cells = [[td.get_text() for td in tr.select("td")] for tr in shown.select("tbody tr")]
    assert cells == [["<b> & c", "1", "0.123"], ["x", "-20", "2.000"]]
    right = [
        ["right" in td.get("style", "") for td in tr.select("td")] for tr in shown.select("tr")
    ]
    assert right == [[], [False, True, True], [False, True, True]]
    assert len(shown.select("th")) == 3


def test_a_column_without_a_name_has_no_head():
    shown = BeautifulSoup(table(["", "a"], [["x", 1]])._repr_html_(), "html.parser")
    assert [h.get_text() for h in shown.select("th")] == ["a"]
    assert len(shown.select("thead td")) == 1


def test_each_column_has_digits_of_its_own():
    text = repr(table(["a", "b"], [[1.0, 1e-7]], digits=[".1f", ".0e"]))
    assert text.splitlines()[-1].split() == ["1.0", "1e-07"]


def test_text_stays_as_it_was_written():
    assert repr(table(["a"], [["1e-3"], ["0.10"]])).split()[-2:] == ["1e-3", "0.10"]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"expected 2 values .* got \[1\]"):
        table(["a", "b"], [[1]])


def test_digits_for_another_number_of_columns_are_refused():
    with pytest.raises(ValueError, match=r"expected digits for 2 columns, got \['.1f'\]"):
        table(["a", "b"], [[1.0, 2.0]], digits=[".1f"])
