"""Hope: self-modifying Titans followed by a Continuum Memory System (arXiv 2512.24695).

Pure tensor mathematics: nothing in this package opens a file, reads a clock or knows of ranks.
"""

from hope.config import AttentionConfig, CMSConfig, HopeConfig, LevelConfig, TitansConfig
from hope.model import HopeModel
from hope.state import ModelState

__all__ = [
    "AttentionConfig",
    "CMSConfig",
    "HopeConfig",
    "HopeModel",
    "LevelConfig",
    "ModelState",
    "TitansConfig",
]
