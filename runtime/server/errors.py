"""Errors as OpenAI's interface has them: a proper status, and the field that is to blame."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from irc.core.errors import IrcError, OptionError

_NAMES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "request_too_large",
          429: "rate_limit_error", 408: "timeout_error", 503: "overloaded_error"}  # fmt: skip


class ApiError(Exception):
    """Something to tell the client.

    Attributes:
        param: the field that is to blame, or None.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON that says it."""
        kind = _NAMES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status)


def install(app: FastAPI) -> None:
    """Let every error of the application be told that way."""

    @app.exception_handler(ApiError)
    async def of_api(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def of_fields(_: Request, error: RequestValidationError) -> JSONResponse:
        return _validation(error).response()

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, str(error.detail)).response()

    @app.exception_handler(OptionError)
    async def of_options(_: Request, error: OptionError) -> JSONResponse:
        return ApiError(400, str(error), _blamed(str(error))).response()

    @app.exception_handler(IrcError)
    async def of_engine(_: Request, error: IrcError) -> JSONResponse:
        return ApiError(503, str(error)).response()


def _validation(error: RequestValidationError) -> ApiError:
    found = error.errors()
    first = found[0]
    place = [str(part) for part in first.get("loc", ()) if part != "body"]
    if first.get("type") == "json_invalid":
        return ApiError(400, f"the body is no valid JSON: {first.get('ctx', {}).get('error', first.get('msg'))}")
    param = ".".join(part for part in place if not part.startswith("function-")) or None
    if first.get("type") == "extra_forbidden":
        return ApiError(400, f"unknown parameter: {param}", param, "unknown_parameter")
    if param is None:
        return ApiError(400, "the body must be a JSON object, sent as application/json")
    message = "; ".join(f"{'.'.join(str(p) for p in one['loc'] if p != 'body')}: {one['msg']}" for one in found[:5])
    return ApiError(400, message, param)


def _blamed(message: str) -> str | None:
    """The field that an option's message is about."""
    for word, field in (
        ("the prompt", "prompt"), ("can grow to", "max_tokens"), ("logit_bias", "logit_bias"), ("top_p", "top_p"),
        ("json_schema", "response_format"), ("regex", "response_format"), ("grammar", "response_format"),
    ):  # fmt: skip
        if word in message:
            return field
    return None
