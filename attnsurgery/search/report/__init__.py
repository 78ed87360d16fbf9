"""The search as one HTML file that opens from disk and can be mailed: pictures made with Bokeh, no network at all.

`page.py` puts the sections in order, and each of the other files makes one of them. Pictures live in the files that
import Bokeh, which takes over half a second; so these are imported when a page is made, and not before.
"""

from attnsurgery.search.report.page import render

__all__ = ["render"]
