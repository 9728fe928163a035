"""Glitch tokens: tokenizer analysis, indicators from the weights alone, verification with controls."""

from workbench.glitch.report import GlitchReport
from workbench.glitch.result import TokenizerFacts, TokenTable
from workbench.glitch.scanner import ScanOptions, scan
from workbench.glitch.verify import VerifyOptions

__all__ = ["GlitchReport", "ScanOptions", "TokenTable", "TokenizerFacts", "VerifyOptions", "scan"]
