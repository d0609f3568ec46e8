"""Hope: self-modifying Titans followed by a Continuum Memory System (arXiv 2512.24695).

Pure tensor mathematics: nothing in this package reads a clock or knows of ranks, or opens a file
other than its own sources and what compilers made of them (`compile_cache.py`).
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
