"""A page to try the model in the browser: no library, nothing from elsewhere."""

from __future__ import annotations

from importlib import resources

import jinja2


def render_page(name: str, *, generates: bool, chat: bool, key: bool) -> str:
    """The page as HTML.

    Args:
        name: of the model.
        generates: it makes text; else it only embeds.
        chat: it was taught a chat, so that is what the page begins with; else it continues texts.
        key: requests need a key, so the page asks for it.
    """
    source = resources.files("irc.runtime.server").joinpath("page.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True).from_string(source)
    return template.render(name=name, generates=generates, chat=chat, key=key)
