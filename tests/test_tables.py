"""configs/tables.py: tables that a Markdown reader and a person at a terminal can both read."""

import pytest

from configs.tables import csv_table, duration, markdown_table


def test_cells_are_aligned():
    """The first column to the left, the others to the right; the ruler says the same; all lines are equally long."""
    table = markdown_table([{"run": "uncached", "PSNR": "9.5"}, {"run": "N2", "PSNR": "31.25"}])
    assert table.splitlines() == [
        "| run      |  PSNR |",
        "| :------- | ----: |",
        "| uncached |   9.5 |",
        "| N2       | 31.25 |",
    ]


def test_columns_that_are_empty_in_all_rows_are_left_out():
    rows = [{"run": "a", "LPIPS": "", "SSIM": "1"}, {"run": "b", "SSIM": ""}]
    assert markdown_table(rows).splitlines()[0] == "| run | SSIM |"
    assert markdown_table([{"": "", "x": "1"}]).splitlines()[0] == "| x   |"


def test_a_missing_cell_is_a_dash():
    """Whether its text is empty or its title is absent from the row; titles stand in the order of their first rows."""
    table = markdown_table([{"run": "a", "x": "1"}, {"run": "b", "y": "2"}, {"run": "", "x": "", "y": "3"}])
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["|", "a", "|", "1", "|", "–", "|"],
        ["|", "b", "|", "–", "|", "2", "|"],
        ["|", "–", "|", "–", "|", "3", "|"],
    ]


def test_a_narrow_table_still_has_a_ruler_of_three():
    """Markdown wants at least three characters."""
    assert markdown_table([{"a": "1", "b": "2"}]).splitlines()[1] == "| :-- | --: |"


def test_csv_has_a_column_for_each_title_of_any_row():
    rows = [{"run": "a", "fvd": 1.5}, {"run": "b, c", "fid": 2}]
    assert csv_table(rows) == 'run,fvd,fid\na,1.5,\n"b, c",,2\n'


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (163.7, "2 min 44 s"), (3600, "1 h 0 min"), (11105, "3 h 5 min"),
     (86399.7, "1 d 0 h"), (187200, "2 d 4 h")],
)  # fmt: skip
def test_durations_are_in_words(seconds, text):
    assert duration(seconds) == text
