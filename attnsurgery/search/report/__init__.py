"""The search as one HTML file that opens from disk and can be mailed: pictures made with Bokeh, no network at all.

`sections/` holds one file for each section of the page; `page.py` puts them together with `templates/page.html`. Bokeh
takes over half a second to import, so the files that draw are imported when a page is made, and not before.
"""

from attnsurgery.search.report.page import render

__all__ = ["render"]
