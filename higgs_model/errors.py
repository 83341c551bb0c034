"""The errors of the project, and who is to blame for each.

    HiggsError
    ├── BadInput        what the caller passed is wrong: this row, this request   (also a ValueError)
    ├── BadConfig       a configuration contradicts itself                        (also a ValueError)
    └── BadCheckpoint   the files on disk are not the model that they claim to be

Every message is one sentence that names what, where, what was found and what was wanted. An error of none of
these types is a fault of ours.
"""

from __future__ import annotations


class HiggsError(Exception):
    """Base of all errors that a user can mend."""


class BadInput(HiggsError, ValueError):
    """What the caller passed is wrong; other rows and requests are unaffected."""


class BadConfig(HiggsError, ValueError):
    """A configuration contradicts itself or names something unknown."""


class BadCheckpoint(HiggsError):
    """A checkpoint is missing, incomplete, or does not hold the tensors that its configuration asks for."""
