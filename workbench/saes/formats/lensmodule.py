"""sae_lens, imported late and quietly."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType
from typing import Any, TypeAlias

from workbench.bases.sae import as_basis
from workbench.core.errors import InvalidInputError
from workbench.core.html import facts, framed, heading

LensSAE: TypeAlias = Any
"""An SAE of sae_lens: which parameters it has depends on its architecture, and sae_lens is imported late."""


def sae_lens_module() -> ModuleType:
    """sae_lens, imported here because it takes seconds; its own use of a deprecated module is kept quiet.

    In a notebook, its SAEs then show their sizes and where they belong instead of their modules.
    """
    with warnings.catch_warnings():
        # sae_lens 6.54 imports transformer_lens.utils, which 3.9 deprecates.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        import sae_lens
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        shell.display_formatter.formatters["text/html"].for_type(sae_lens.SAE, sae_html)
    return sae_lens


def sae_html(sae: LensSAE) -> str | None:
    """An SAE as a small table; None for one that is no basis."""
    try:
        basis = as_basis(sae)
    except InvalidInputError:
        return None
    return framed(heading(type(sae).__name__, basis.site or "an unknown site"), facts(basis._shown_facts()))
