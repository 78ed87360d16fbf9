"""Test images with what the base and the winner return for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attnsurgery.search.report.section import Section, register
from attnsurgery.search.report.template import html
from attnsurgery.search.storage.pictures import BASE, read_pictures

if TYPE_CHECKING:
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome


@register(order=18)
def section(outcome: Outcome, control: Control | None = None) -> Section | None:
    """One row for each image; None if the task has no pictures, or winner and base were not compared."""
    if outcome.confirmation is None:
        return None
    base = read_pictures(outcome.folder, BASE)
    winner = read_pictures(outcome.folder, outcome.confirmation.digest)
    if base is None or winner is None:
        return None
    rows = [_cells(*pair) for pair in zip(base["pictures"], winner["pictures"], strict=False)]
    legend = [(name, "#{:02x}{:02x}{:02x}".format(*colour)) for name, colour in base["legend"]]
    return Section(
        "pictures",
        "Pictures: what base and winner predict",
        below=html(_BELOW, rows=rows, legend=legend, swatch=_SWATCH),
    )


def _cells(base: Mapping[str, str], winner: Mapping[str, str]) -> list[tuple[str, str]]:
    """A row of the table: sources of pictures, and their descriptions."""
    name = base["id"]
    return [
        (base["image"], name),
        (base["target"], f"mask of {name}"),
        (base["output"], f"the base's prediction for {name}"),
        (winner["output"], f"the winner's prediction for {name}"),
    ]


_SWATCH = "display: inline-block; width: 0.8em; height: 0.8em"
_BELOW = """\
<p>Some test images, evenly spaced and not chosen, with the mask and the predictions of the first trainings of base and
winner. Pixels that do not count are black.</p>
<table><thead><tr><th>image</th><th>mask</th><th>base</th><th>winner</th></tr></thead><tbody>
{% for cells in rows %}
<tr>
{% for source, words in cells %}
<td><img src="{{ source }}" alt="{{ words }}" style="width: 100%; max-width: 200px"></td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table>
<p>
{% for name, colour in legend %}
<span style="white-space: nowrap"><span aria-hidden="true" style="{{ swatch }}; background: {{ colour }}"></span>
{{ name }}</span>
{% endfor %}
</p>
"""
