"""What the folders of Gemma Scope say about an SAE."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from workbench.hooks.sites import Site

_LAYER = re.compile(r"layer_(\d+)")
_GEMMA_SCOPE = {
    "transcoder": "transcoder", r"-res\b|resid_post": "resid_post", r"-mlp\b|mlp_out": "mlp_out",
    r"-att\b|attn_out": "z",
}  # fmt: skip


@dataclass(frozen=True)
class GemmaScopeName:
    """What the folders of Gemma Scope say about an SAE, such as `gemma-scope-2b-pt-mlp/layer_12/width_16k`.

    Only the release and what is below it count, or without a release the last `layer_N` and the folder it is in: a path
    above them is named by whoever keeps the files.

    Attributes:
        kind: "transcoder", or the kind of site: the release decides if it names one (`-res`, `-mlp`, `-att`), else the
            folders in it; the residual stream if none does.
        layer: the last `layer_N`; None without one.
    """

    kind: str
    layer: int | None

    @classmethod
    def of(cls, path: Path) -> GemmaScopeName:
        """From a path."""
        parts = path.parts
        releases = [i for i, part in enumerate(parts) if "gemma-scope" in part]
        above_layers = [max(0, i - 1) for i, part in enumerate(parts) if _LAYER.search(part)]
        begins = (releases or above_layers or [len(parts)])[-1]
        parts = parts[begins:]
        kinds = (kind for part in parts for pattern, kind in _GEMMA_SCOPE.items() if re.search(pattern, part))
        found = _LAYER.findall("/".join(parts))
        return cls(next(kinds, "resid_post"), int(found[-1]) if found else None)

    @property
    def hooks(self) -> tuple[str, str] | None:
        """What a transcoder reads and writes, in the names of TransformerLens; None for others, or without a layer.

        Its authors moved the gain of the norm before the MLP into the MLP, so it reads the norm without its gain.
        """
        if self.layer is None or self.kind != "transcoder":
            return None
        return f"blocks.{self.layer}.ln2.hook_normalized", f"blocks.{self.layer}.hook_mlp_out"

    @property
    def site(self) -> Site | None:
        """Where the SAE reads; None for a transcoder, or without a layer.

        >>> GemmaScopeName.of(Path("gemma-scope-2b-pt-att/layer_12/width_16k/average_l0_82")).site
        Site(kind='z', layer=12, head=None)
        """
        return None if self.layer is None or self.kind == "transcoder" else Site(self.kind, self.layer)
