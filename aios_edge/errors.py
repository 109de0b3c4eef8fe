"""Every error AIOS Edge raises on purpose.

    AiosEdgeError                 exit 1   HTTP 500
    ├── UsageError                exit 2   HTTP 400   what was typed or written in a recipe, profile or config is wrong
    │   ├── ProfileError                              an unknown or invalid device profile
    │   ├── RecipeError                               an invalid export recipe
    │   ├── SettingsError                             an invalid agent configuration
    │   └── MeasurementRefused                        a measurement that isn't of what is exported; carries what differs
    ├── RequestError              exit 1   HTTP 4xx   a client's request is malformed; carries its own status
    ├── PromiseBroken             exit 3   HTTP 500   a promise was not kept; carries the promise's name
    │   └── BundleRefused                             a bundle failed a named check
    ├── DataError                 exit 1              labelled data that can't be used as it is
    ├── MissingExtra              exit 1              an optional dependency isn't installed; names the extra
    ├── RuntimeUnavailable        exit 1   HTTP 503   onnxruntime or a provider can't do what was asked
    │   └── WorkerLost                                the worker that runs a model died, closed or hung
    ├── ResourceError             exit 1              the machine said no: busy port, full disk, no memory
    └── RemoteError               exit 1   HTTP 502   a broker or another server failed or answered nonsense

An error says what was wrong, where, and what to do about it. The CLI catches the root once and turns it into
one message and an exit code; the HTTP server turns it into ``{"error": …}``. Foreign exceptions are wrapped
where they enter, with ``raise … from``. An expected outcome (a shed request, no data) is a value, not an error.
"""

from __future__ import annotations


class AiosEdgeError(Exception):
    """Root of the tree.

    ``what`` is a sentence without its full stop, ``where`` a file, key, URL or component, ``remedy`` an
    imperative the reader can follow.
    """

    exit_code = 1
    http_status = 500

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}. {self.remedy}" if self.remedy else text


class UsageError(AiosEdgeError):
    """What was typed, or written in a file we read, is wrong."""

    exit_code = 2
    http_status = 400


class ProfileError(UsageError):
    """A device profile is unknown or invalid."""


class RecipeError(UsageError):
    """An export recipe is invalid."""


class SettingsError(UsageError):
    """An agent configuration is invalid."""


class MeasurementRefused(UsageError):
    """A measurement can't be used for this export; ``check`` names what differs (``profile``, ``host``, ``candidate``,
    ``model_sha256`` …)."""

    def __init__(self, check: str, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.check = check

    def __str__(self) -> str:
        return f"[{self.check}] {super().__str__()}"


class RequestError(AiosEdgeError):
    """A client's request can't be understood or served; ``status`` is its HTTP status (4xx, 501, 503)."""

    def __init__(self, what: str, *, status: int = 400, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.http_status = status


class PromiseBroken(AiosEdgeError):
    """A promise was not kept; ``promise`` names it (``accuracy_drop``, ``latency_p95_s``, ``golden`` …)."""

    exit_code = 3

    def __init__(self, promise: str, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.promise = promise

    def __str__(self) -> str:
        return f"[{self.promise}] {super().__str__()}"


class BundleRefused(PromiseBroken):
    """A bundle failed one of its named checks (``schema``, ``unlisted``, ``digest``, ``promises``, ``golden`` …)."""


class DataError(AiosEdgeError):
    """Labelled data can't be used as it is."""


class MissingExtra(AiosEdgeError):
    """An optional dependency isn't installed."""

    def __init__(self, package: str, extra: str, *, why: str) -> None:
        super().__init__(
            f"{why} needs the package '{package}', which is not installed",
            remedy=f"Install it with: pip install 'aios-edge[{extra}]'",
        )
        self.extra = extra


class RuntimeUnavailable(AiosEdgeError):
    """onnxruntime, or a provider of it, can't do what was asked."""

    http_status = 503


class WorkerLost(RuntimeUnavailable):
    """The worker that runs a model is gone; what it was working on has no answer."""


class ResourceError(AiosEdgeError):
    """The machine refused: a busy port, a full disk, no memory, a missing permission."""


class RemoteError(AiosEdgeError):
    """A broker or another server could not be reached, failed, or answered nonsense."""

    http_status = 502
