"""The templates of pages and cards."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from camera.escape import lines, markdown
from camera.report.words import count_words, percent
from camera.units import bytes_text


def render(template: str, **content: Any) -> str:
    """Fill one of the templates beside this file. Equal content gives equal bytes.

    In a page everything is escaped; in Markdown, text from outside passes the filter `plain`. In both, control characters
    and what turns the order of letters are shown as escapes.
    """
    environment = Environment(
        loader=PackageLoader("camera", "report"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        finalize=_without_control,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, count=count_words, size=bytes_text, plain=markdown)
    return environment.get_template(template).render(content)


def _without_control(value: Any) -> Any:
    return lines(value) if type(value) is str else value  # not Markup, which is a template's own
