"""What every Bokeh figure is made of: the page's fonts and colours, and how a figure gets into a page."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import dataclass
from typing import Any

from bokeh.embed import json_item
from bokeh.models import BoxZoomTool, ResetTool
from bokeh.models.annotations import Label
from bokeh.plotting import figure

from fragscope.report.colors import placeholder
from fragscope.units import GIB, MIB

_FONT = "Inter, ui-sans-serif, system-ui, sans-serif"


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure as the page carries it.

    Attributes:
        payload: base64 of the zlib-compressed Bokeh JSON; safe inside a script element.
        height: CSS pixels.
    """

    payload: str
    height: int


def unpack(payload: str) -> Any:
    """What the page's script decodes; the inverse of packing."""
    return json.loads(zlib.decompress(base64.b64decode(payload)))


def pack(plot: Any, height: int) -> Drawing:
    """A figure ready for a page."""
    text = json.dumps(json_item(plot), separators=(",", ":"))
    return Drawing(base64.b64encode(zlib.compress(text.encode(), 9)).decode(), height)


def unit_for(largest: int) -> tuple[int, str]:
    """Bytes and name of the unit that suits an axis up to ``largest`` bytes."""
    return (GIB, "GiB") if largest >= 2 * GIB else (MIB, "MiB")


def new_plot(height: int, **options: Any) -> Any:
    """An empty figure in the style of the page, with tools that show when it is pointed at."""
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        toolbar_location="above",
        tools=[],
        min_border_left=56,
        min_border_right=22,
        outline_line_color=None,
        background_fill_color=placeholder("paper"),
        border_fill_color=placeholder("paper"),
        **options,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.add_tools(BoxZoomTool(), ResetTool())
    for axis in plot.axis:
        axis.axis_line_color = placeholder("rule")
        axis.major_tick_line_color = placeholder("rule")
        axis.minor_tick_line_color = None
        axis.major_label_text_color = axis.axis_label_text_color = placeholder("muted")
        axis.major_label_text_font = axis.axis_label_text_font = _FONT
        axis.major_label_text_font_size = axis.axis_label_text_font_size = "12px"
        axis.axis_label_text_font_style = "normal"
    plot.xgrid.grid_line_color = None
    plot.ygrid.grid_line_color = placeholder("grid")
    return plot


def label_at(x: float, y: float, text: str, color: str) -> Label:
    """A word at a place of the figure."""
    return Label(x=x, y=y, text=text, text_color=placeholder(color), text_font=_FONT, text_font_size="12px")
