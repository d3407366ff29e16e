"""The exceptions of the package. Their texts are those of the command."""


class DsmoeError(Exception):
    """An error of dsmoe."""


class ArgumentError(DsmoeError, ValueError):
    """An argument: unknown, out of range, or not with another one."""


class FormatError(DsmoeError, ValueError):
    """A file that is there and is not what it should be."""


class FileError(DsmoeError, OSError):
    """The file system failed."""


class NotFoundError(FileError, FileNotFoundError):
    """A file that is not there."""


class Stopped(DsmoeError):
    """A callback stopped work that then has no result."""
