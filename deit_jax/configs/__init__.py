"""The config files of a checkout; in a wheel they lie here, and this file does not."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "configs")]
