"""The errors a user meets. Each message gives case, found, expected and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class IchError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(IchError):
    """A bundle, preset, key or value that does not exist or does not fit."""


class ManifestError(IchError):
    """A table of cases that cannot be used as it is; the message names the row."""


class ReadError(IchError):
    """A file or series that is not a head CT in HU that can be read whole."""


class GeometryError(IchError):
    """A grid that is broken, or two grids that should be one and are not."""


def own_error(error: BaseException) -> IchError | None:
    """Our own error behind what a library wrapped around it (MONAI does), or None."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, IchError):
        cause = cause.__cause__
    return cause


def reason(error: BaseException) -> str:
    """What went wrong in one line: our own error behind what a library wrapped around it, or the error's type."""
    own = own_error(error)
    text = str(own) if own is not None else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise our own error in place of what a library wrapped around it."""
    try:
        yield
    except Exception as error:
        own = own_error(error)
        if own is None or own is error:
            raise
        raise own from error
