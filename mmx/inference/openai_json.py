"""JSON of somebody else as an object, and what a caller is told instead of an answer."""

import json
import re
from typing import Any

from mmx.convert.bounded import printable

_MANY = 100_000  # objects, lists and members of a request, beside the ids of its prompts
# To the end where it does not end: so no text is gone through twice.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)


class ApiError(Exception):
    """What a caller is told instead of an answer.

    Attributes:
      status: of HTTP.
      param: the field at fault.
      code: a word for programs.
      retry_after: seconds after which the same request may be answered.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's form of an error."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        inside = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": inside}


def parse_body(body: bytes, most: int) -> dict[str, Any]:
    """The object of a request.

    Python needs up to 90 bytes for two of JSON, so what the text is made of is counted first.

    Args:
      body: of a bounded size.
      most: ids that its prompts may have together.

    Raises:
      ApiError: no JSON, not an object, NaN or infinity, or made of too many parts.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"the body is not UTF-8 ({error.reason})", code="invalid_json"
        ) from None
    bare = _STRING.sub("", text)
    lists = bare.count("[") + bare.count("{")
    if lists > _MANY or bare.count(",") > _MANY + most:
        raise ApiError(400, "the body has too many parts", code="invalid_json")
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ApiError(400, "the body is nested too deep", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(
            400, f"the body is not JSON ({printable(str(error))})", code="invalid_json"
        ) from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return found


def bad(param: str, message: str, code: str | None = None) -> ApiError:
    """A field is at fault."""
    return ApiError(400, message, param=param, code=code)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
