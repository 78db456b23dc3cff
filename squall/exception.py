"""Everything Squall raises on purpose.

    Error
    ├── InvalidError               your arguments or options are wrong
    ├── NotFoundError              no such app, function, call, container
    ├── ConflictError              it exists already, or is in a state that forbids this
    ├── AuthError                  no or wrong credentials
    ├── PermissionDeniedError      known, but not allowed
    ├── ResourceExhaustedError     a limit was reached: queue, payload size, GPUs of the node
    ├── RemoteError                your code failed in its container and no exception of yours can tell how
    │   ├── FunctionTimeoutError   one attempt took longer than `timeout` (also a builtin TimeoutError)
    │   ├── ContainerLostError     the container died under the input: killed, crashed, out of memory
    │   ├── StartupError           no container could start: the import failed or start-up took too long
    │   ├── BuildError             a step of an image failed: says which, what it wrote, and why it may be
    │   └── CancelledError         the input was cancelled before it ended
    ├── OutputTimeoutError         `get(timeout=...)` passed first (also a builtin TimeoutError)
    ├── OutputExpiredError         the result was kept its days and is gone
    ├── SerializationError         a value could not be pickled or unpickled; says which
    ├── ServiceError               the server is unreachable or broke off; trying again is safe
    ├── VersionError               client, server or runner speak different versions
    └── InternalError              a bug in Squall: says so and what to send us

An exception your own function raises comes back as itself, with its own type and remote traceback lines.
Each class carries a wire `code`, an HTTP `status` and an optional `hint`, shown the same in CLI, API and dashboard.
"""

from __future__ import annotations


class Error(Exception):
    """Root of all errors of Squall. `hint`: what to do next, or empty."""

    code = "error"
    status = 500

    def __init__(self, message: str = "", *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.hint), dict(vars(self))


def _rebuild(cls: type[Error], message: str, hint: str) -> Error:
    error = cls.__new__(cls)  # a user's subclass may want other arguments
    Error.__init__(error, message, hint=hint)
    return error


class InvalidError(Error):
    """Your arguments or options are wrong."""

    code, status = "invalid", 400


class NotFoundError(Error):
    """No such app, function, call or container."""

    code, status = "not_found", 404


class ConflictError(Error):
    """It exists already, or is in a state that forbids this."""

    code, status = "conflict", 409


class AuthError(Error):
    """No credentials, or wrong ones."""

    code, status = "auth", 401


class PermissionDeniedError(Error):
    """Known, but not allowed."""

    code, status = "permission_denied", 403


class ResourceExhaustedError(Error):
    """A limit was reached: of the queue, of a payload, of what any machine has."""

    code, status = "resource_exhausted", 429


class RemoteError(Error):
    """Your code failed in its container and no exception of yours can tell how.

    `remote_type` and `remote_traceback` tell of the original exception where one could not travel."""

    code, status = "remote", 502
    remote_type = ""
    remote_traceback = ""


class FunctionTimeoutError(RemoteError, TimeoutError):
    """One attempt took longer than the function's `timeout`."""

    code, status = "timeout", 504


class ContainerLostError(RemoteError):
    """The container died under the input: it exited, crashed, was killed or ran out of memory."""

    code = "lost"


class StartupError(RemoteError):
    """No container could start; the exception of a failed import is its `__cause__`."""

    code = "init_error"
    packed = b""
    """That exception as it travels, in the answer to a deploy."""


class BuildError(RemoteError):
    code, status = "build", 422


class CancelledError(RemoteError):
    """The input, or its app, was cancelled before it ended."""

    code, status = "cancelled", 499


class OutputTimeoutError(Error, TimeoutError):
    """The time given to `get` passed first; the call goes on."""

    code, status = "output_timeout", 504


class OutputExpiredError(Error):
    """The result was kept its 7 days and is gone."""

    code, status = "output_expired", 410


class SerializationError(Error):
    """A value could not be pickled or unpickled; the message names it."""

    code, status = "serialization", 400


class ServiceError(Error):
    """The server cannot be reached or broke off. What was called may have run."""

    code, status = "service", 503


class VersionError(Error):
    """Client, server or runner speak different versions."""

    code, status = "version", 426


class InternalError(Error):
    """A bug in Squall."""

    code, status = "internal", 500


class InputCancellation(BaseException):
    """Raised in a running function when its input is cancelled; a BaseException, so `except Exception` lets it by.

    Catch it to clean up, and raise it again. The container is killed when the input has not ended 10 s later.

    Example:

        @app.function()
        def careful():
            try:
                return "worked"
            except squall.InputCancellation:
                print("cleaning up")
                raise
    """


def all_errors() -> dict[str, type[Error]]:
    """Wire code -> class, for every error above."""
    found: dict[str, type[Error]] = {}
    pending: list[type[Error]] = [Error]
    while pending:
        cls = pending.pop()
        found[cls.code] = cls
        # Other rooms derive errors of their own; on the wire those are what they derive from.
        pending.extend(sub for sub in cls.__subclasses__() if sub.__module__ == __name__)
    return found


def from_wire(code: str, message: str, hint: str = "") -> Error:
    """The error a `Failure` message stands for; an unknown code becomes the root class."""
    return all_errors().get(code, Error)(message, hint=hint)
