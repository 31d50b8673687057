"""The templates of pages and cards."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from camera.report.table import plain
from camera.report.words import count_words, percent
from camera.units import bytes_text


def render(template: str, **content: Any) -> str:
    """Fill one of the templates beside this file. Equal content gives equal bytes.

    In a page everything is escaped; in Markdown, text from outside passes the filter `plain`.
    """
    environment = Environment(
        loader=PackageLoader("camera", "report"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, count=count_words, size=bytes_text, plain=plain)
    return environment.get_template(template).render(content)
