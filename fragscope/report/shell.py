"""What every HTML page has around its content: style, scripts, and a policy under which nothing else runs or loads."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fragscope.report.colors import NAMES, SCHEMES


def page(template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """A whole page as one string.

    Args:
        template: name of one that extends ``page.html``.
        filters: functions that it calls, by name.
        values: what it shows; everything in them is escaped. ``draws`` says whether there is a figure.
    """
    environment = Environment(
        loader=PackageLoader("fragscope.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(filters)
    bokeh = _bokeh_script()
    script = environment.get_template("report.js").render().strip()
    return environment.get_template(template).render(
        style=Markup(environment.get_template("report.css").render(schemes=SCHEMES)),  # noqa: S704 our own file
        bokeh=Markup(bokeh),  # noqa: S704 the library's own script
        script=Markup(script),  # noqa: S704 our own file
        script_hashes=" ".join(_hash(text) for text in (bokeh, script)),
        color_names=" ".join(NAMES),
        **values,
    )


@cache
def _bokeh_script() -> str:
    """Bokeh's core without its widgets, tables, WebGL and MathJax, which no figure here uses."""
    text = "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)
    assert "</script" not in text.lower()
    return text


def _hash(script: str) -> str:
    """The script's source expression for the page's Content-Security-Policy: nothing else may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
