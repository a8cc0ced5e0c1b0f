"""docs/coverage.md against the library as it is."""

from coverage_table import HEADINGS, cases_section, sections


def test_the_table_of_small_cases_is_up_to_date():
    """Run `python tests/coverage_table.py` where this fails."""
    assert sections()[HEADINGS[0]] == cases_section()
