"""The feature browser: a page of all features of an SAE, and the card of one, from plain values."""

from workbench.report.features.encode import PackOptions
from workbench.report.features.render import FeaturePage, card_html, feature_page

__all__ = ["FeaturePage", "PackOptions", "card_html", "feature_page"]
