"""Where lenses read, and where they lead."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.core.errors import DegenerateInputError, MismatchError
from workbench.models.model import Model


def target_of(model: Model) -> str:
    """The output of the last block."""
    return str(model.resolve("resid_post.-1"))


def lens_sites(model: Model, sites: Sequence[str] | None = None) -> tuple[str, ...]:
    """The sites of the residual stream that a lens reads: by default the output of every block but the last.

    Raises:
        MismatchError: for a site outside the stream, or behind the target.
        DegenerateInputError: if there is none.
    """
    target = model.resolve("resid_post.-1")
    wanted = ["resid_post"] if sites is None else list(sites)
    named = sorted(model.site_map.named(wanted), key=lambda site: site.order)
    found = [site for site in named if sites is not None or site != target]
    for site in found:
        if site.kind not in ("embed", "resid_pre", "resid_mid", "resid_post"):
            raise MismatchError(
                f"A lens can't read {site}: it maps the residual stream. Choose among resid_pre, resid_mid, resid_post."
            )
    if not found:
        raise DegenerateInputError(f"A lens of {model.name} has no site to read: it has one block.")
    return tuple(map(str, found))


def distant_sites(sites: list[str]) -> dict[str, str]:
    """For each site the one that is half of them away, in a circle."""
    return {site: sites[(i + len(sites) // 2) % len(sites)] for i, site in enumerate(sites)}
