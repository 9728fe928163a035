"""sae_lens, imported late and quietly."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any, TypeAlias

LensSAE: TypeAlias = Any
"""An SAE of sae_lens: which parameters it has depends on its architecture, and sae_lens is imported late."""


def sae_lens_module() -> ModuleType:
    """sae_lens, imported here because it takes seconds; its own use of a deprecated module is kept quiet."""
    with warnings.catch_warnings():
        # sae_lens 6.54 imports transformer_lens.utils, which 3.9 deprecates.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        import sae_lens
    return sae_lens
