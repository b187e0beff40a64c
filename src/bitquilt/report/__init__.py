"""What came of it? `read_facts(folder)` gathers, `report_page` and `compare_page` show: one file, no network."""

from bitquilt.report.facts import Facts, read_facts
from bitquilt.report.page import compare_page, report_page
from bitquilt.report.pareto import Entry, compare
from bitquilt.report.remembered import Record, describe_evaluation, remember

__all__ = [
    "Entry",
    "Facts",
    "Record",
    "compare",
    "compare_page",
    "describe_evaluation",
    "read_facts",
    "remember",
    "report_page",
]
