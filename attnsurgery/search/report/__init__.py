"""The report of a search: one HTML file with Bokeh figures, which works offline.

`sections/` has one file for each section of the page, and `page.py` combines them with `templates/page.html`. Bokeh
takes over half a second to import, so the modules that draw are imported only when a page is made.
"""

from attnsurgery.search.report.page import render

__all__ = ["render"]
