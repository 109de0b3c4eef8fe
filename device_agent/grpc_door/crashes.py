"""What grpcio says in the log: hears there of the end of its server, which it tells nobody else.

It decodes the path of every call, and ends at the first that isn't UTF-8 (1.85 does, and so did those before). What is
open then goes on, but nothing new is accepted. Such lines don't stay in the log, nor do others that any client can
cause as often as he likes: they have a traceback each, and one of them has the key that was sent.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

_LOGS = ("grpc._cython.cygrpc", "asyncio")
#: A call that ended before its answer was sent; metadata that isn't UTF-8 (it is taken as Latin-1 then).
_ANYBODYS = ("ExecuteBatchError", "Invalid encoding on ")


class Crashes(logging.Filter):
    """Tells all who listen, in the event loop's thread; which of them is concerned they see for themselves."""

    def __init__(self) -> None:
        super().__init__()
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
        self._last: BaseException | None = None

    def listen(self, listener: Listener) -> None:
        """Tell this one, as long as it lives."""
        for name in _LOGS:
            logging.getLogger(name).addFilter(self)  # which takes a filter once
        self._listeners.add(listener)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line stays in the log."""
        if record.name == _LOGS[0] and isinstance(record.msg, BaseException):  # what ended it is all the line there is
            self._last = record.msg
            for listener in tuple(self._listeners):
                listener.heard(record.msg)
            return False
        if record.name == _LOGS[0]:
            return not record.getMessage().startswith(_ANYBODYS)
        return not (record.exc_info and record.exc_info[1] is not None and record.exc_info[1] is self._last)


class Listener:
    """``on_crash`` hears the reason."""

    def __init__(self, on_crash: Callable[[BaseException], None]) -> None:
        self.heard = on_crash


CRASHES = Crashes()
