"""Results of a run: `read_facts` gathers them, `compare` ranks checkpoints, `report_page` shows them."""

from bitquilt.report.evaluation_records import Record, describe_evaluation, remember
from bitquilt.report.facts import Facts, read_facts
from bitquilt.report.page import compare_page, report_page
from bitquilt.report.pareto import Entry, compare

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
