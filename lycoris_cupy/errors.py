"""The errors this package raises. Each names the thing, what it is, what it should be, and what to
do.

Every kind is also a builtin's subclass, so that callers who know nothing of this package catch it.
"""


class LycorisError(Exception):
    """Any error of this package; the command line prints it as one line and exits with 2."""


class ShapeError(LycorisError, ValueError):
    """An array has the wrong shape."""


class DtypeError(LycorisError, TypeError):
    """An array has a dtype that the operation does not take."""


class DeviceError(LycorisError, RuntimeError):
    """A device was asked for that is not there, or arrays lie on different devices."""


class FileFormatError(LycorisError, ValueError):
    """A file is broken, or says something that cannot be carried out."""


class MatchError(LycorisError, LookupError):
    """Names in a file do not match the base they are meant for."""


class KernelError(LycorisError, RuntimeError):
    """A CUDA kernel could not be compiled, or was launched with the wrong arguments."""
