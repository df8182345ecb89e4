"""What a server is told: limits, key, name."""

from __future__ import annotations

from dataclasses import dataclass

from irc.core.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits of a server.

    Attributes:
        name: of the model, as clients call it.
        api_key: clients must send it as a bearer token; None: anyone may.
        max_body_bytes: of a request.
        max_requests: that may be open at once; more are told to come back later.
        max_new_tokens: most that a request may ask for; None: what fits into the cache.
        max_samples: most that `n` (times the number of prompts) may be.
        timeout_s: after which a request is ended; None: never.
        drain_s: how long a stopping server waits for what runs.
    """

    name: str = "model"
    api_key: str | None = None
    max_body_bytes: int = 4 << 20
    max_requests: int = 1024
    max_new_tokens: int | None = None
    max_samples: int = 64
    timeout_s: float | None = 600.0
    drain_s: float = 60.0

    def __post_init__(self) -> None:
        problems = [
            f"{field} must be above 0, not {value}"
            for field, value in vars(self).items()
            if isinstance(value, (int, float)) and value <= 0
        ]
        if self.api_key == "":
            problems.append("api_key is empty")
        if problems:
            raise OptionError("server: " + "; ".join(problems))
