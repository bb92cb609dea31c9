"""The errors a user meets. Each message gives case, found, expected and what to do."""


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
