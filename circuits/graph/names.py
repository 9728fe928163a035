"""What the nodes of a circuit are called."""

from __future__ import annotations

ERROR = -1
"""The number of a site's error node."""


def node_name(site: str, pos: int, feature: int) -> str:
    """What a node is called: site and feature, with the position where it has one.

    >>> node_name("resid_post.10", -1, 123), node_name("mlp_out.3", 4, ERROR)
    ('resid_post.10/123', '4, mlp_out.3/error')
    """
    place = "" if pos < 0 else f"{pos}, "
    return f"{place}{site}/{'error' if feature == ERROR else feature}"
