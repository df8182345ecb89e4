"""Chat templates: the model's own Jinja text, rendered in a sandbox that can neither import nor change anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from irc.core.errors import OptionError

DEFAULT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
"""For models that were never taught a chat: the texts, one behind the other."""


class ChatTemplate:
    """Messages → prompt.

    Attributes:
        taught: the model comes with a template of its own.

    Raises:
        OptionError: the template cannot be read.
    """

    def __init__(self, text: str | None = None, **variables: Any) -> None:
        self.taught = text is not None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
        environment.globals["raise_exception"] = _refuse
        self._variables = variables
        try:
            self._template = environment.from_string(DEFAULT if text is None else text)
        except jinja2.TemplateError as error:
            raise OptionError(f"the chat template cannot be read: {error}") from None

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt, up to where the answer begins.

        Raises:
            OptionError: the template refuses these messages, or tries something forbidden.
        """
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self._variables)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise OptionError(f"the prompt cannot be made from these messages: {error}") from None


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
