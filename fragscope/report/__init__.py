"""What people read: a table for the terminal, Markdown for a pull request, one self-contained HTML page.

All three show the same ``Summary`` of a results file. Names in it may come from strangers: each renderer escapes them
in its own way. The table and Markdown need nothing beyond the core; the page needs the extra ``report``.
"""

from fragscope.report.html import write_html, write_sweep_html, write_thresholds_html
from fragscope.report.markdown import markdown
from fragscope.report.summary import Group, Row, Summary, refutation, summarize
from fragscope.report.table import results_table

__all__ = [
    "Group",
    "Row",
    "Summary",
    "markdown",
    "refutation",
    "results_table",
    "summarize",
    "write_html",
    "write_sweep_html",
    "write_thresholds_html",
]
