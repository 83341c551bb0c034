"""The exceptions of the project.

    HiggsError
    ├── BadInput        an argument, a row or a request is invalid     (also a ValueError)
    ├── BadConfig       a configuration is inconsistent or unknown     (also a ValueError)
    └── BadCheckpoint   a checkpoint does not match its configuration

Every message is one sentence that names what failed, where, what was found and what was expected. Any other exception
type is an internal error.
"""

from __future__ import annotations


class HiggsError(Exception):
    """Base class of all errors that the user can fix."""


class BadInput(HiggsError, ValueError):
    """The caller passed invalid input. Other rows and requests are unaffected."""


class BadConfig(HiggsError, ValueError):
    """A configuration contradicts itself or names something unknown."""


class BadCheckpoint(HiggsError):
    """A checkpoint is missing, incomplete, or lacks tensors that its configuration requires."""
