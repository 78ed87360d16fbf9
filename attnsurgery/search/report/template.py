"""HTML templates by Jinja2: values are escaped unless they are HTML already, and a name without a value is an error."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

_ENVIRONMENT = Environment(
    loader=PackageLoader("attnsurgery.search.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def html(source: str, **values: object) -> Markup:
    """The Jinja2 template `source` filled in with `values`.

    Raises:
        jinja2.UndefinedError: the template uses a name that `values` lacks.
    """
    return Markup(_template(source).render(values))


def html_file(name: str, **values: object) -> str:
    """The template `templates/<name>` filled in with `values`."""
    return _ENVIRONMENT.get_template(name).render(values)


@cache
def _template(source: str) -> Template:
    return _ENVIRONMENT.from_string(source)
