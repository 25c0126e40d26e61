"""Markdown tables with aligned columns."""

from __future__ import annotations

from amct_ext.explain.table import markdown_table


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    table = markdown_table(["layer", "x"], [["conv1", "INT8"], ["a", ""]])
    assert table.splitlines() == [
        "| layer | x    |",
        "| ----- | ---- |",
        "| conv1 | INT8 |",
        "| a     |      |",
    ]


def test_a_table_without_rows_is_its_head() -> None:
    assert markdown_table(["a"], []) == "| a |\n| - |"
