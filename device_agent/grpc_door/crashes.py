"""What grpcio says in the log: hears there of the end of its server, which it tells nobody else.

It decodes the path of every call, and ends at the first that isn't UTF-8 (1.85 does, and so did those before). What is
open then goes on, but nothing new is accepted. Such lines don't stay in the log, nor do others that any client can
cause as often as he likes: they have a traceback each, and one of them has the key that was sent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

_GRPC = "grpc._cython.cygrpc"
#: A call that ended before its answer was sent; metadata that isn't UTF-8 (it is taken as Latin-1 then).
_ANYBODYS = ("ExecuteBatchError", "Invalid encoding on ")


class Crashes(logging.Filter):
    """``on_crash`` hears the reason, in the event loop's thread, from :meth:`begin` to :meth:`end`."""

    def __init__(self, on_crash: Callable[[BaseException], None]) -> None:
        super().__init__()
        self._on_crash = on_crash
        self._last: BaseException | None = None
        self._loggers = (logging.getLogger(_GRPC), logging.getLogger("asyncio"))

    def begin(self) -> None:
        """Listen."""
        for logger in self._loggers:
            logger.addFilter(self)

    def end(self) -> None:
        """Listen no more; safe to call twice."""
        for logger in self._loggers:
            logger.removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line stays in the log."""
        if record.name != _GRPC:  # asyncio's, of the task that ended by it
            return record.exc_info is None or self._last is None or record.exc_info[1] is not self._last
        if isinstance(record.msg, BaseException):  # what ended it is all the line there is
            self._last = record.msg
            self._on_crash(record.msg)
            return False
        return not record.getMessage().startswith(_ANYBODYS)
