"""Sparse language models: DSMoE and the methods beside it, made, trained, measured and run.

Functions are the commands of `dsmoe` and return what these print with `--json`; `load` keeps a model in memory.
"""

from ._commands import (
    command,
    convert,
    evaluate,
    export,
    init,
    inspect,
    methods,
    prune,
    set_threads,
    tensors,
    train,
)
from ._errors import ArgumentError, DsmoeError, FileError, FormatError, NotFoundError, Stopped
from ._model import Model, load
from ._native import Routing, __version__

__all__ = [
    "ArgumentError",
    "DsmoeError",
    "FileError",
    "FormatError",
    "Model",
    "NotFoundError",
    "Routing",
    "Stopped",
    "__version__",
    "command",
    "convert",
    "evaluate",
    "export",
    "init",
    "inspect",
    "load",
    "methods",
    "prune",
    "set_threads",
    "tensors",
    "train",
]
