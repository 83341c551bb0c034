"""The model called `demo`, which needs neither network nor GPU.

Until a trained one is embedded it is a stand-in: a network and a codec of the published structure, made very small,
with random weights from a fixed seed. It goes every step of the way that a real checkpoint goes, and says nothing.
"""

from __future__ import annotations

from higgs_model.demo.standin import NOTICE as NOTICE
from higgs_model.demo.standin import build as build
