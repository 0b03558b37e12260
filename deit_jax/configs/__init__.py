"""The config files of a checkout; in a wheel they lie here, and this file does not."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # type checkers do not follow a computed __path__
    from configs import base as base

__path__ = [str(Path(__file__).parents[2] / "configs")]
