"""Glitch tokens: tokenizer analysis, a ranking from the weights alone, tests beside controls, census, lint, repair."""

from workbench.glitch.api import census, diff, lint, scan
from workbench.glitch.banlist import ban_list
from workbench.glitch.census_report import CensusReport
from workbench.glitch.census_result import CensusOptions
from workbench.glitch.repair_check import check_repair
from workbench.glitch.repairing import RepairOptions, repair
from workbench.glitch.report import GlitchReport
from workbench.glitch.result import TokenizerFacts, TokenTable
from workbench.glitch.scanner import ScanOptions, examine
from workbench.glitch.verify import VerifyOptions

__all__ = [
    "CensusOptions",
    "CensusReport",
    "GlitchReport",
    "RepairOptions",
    "ScanOptions",
    "TokenTable",
    "TokenizerFacts",
    "VerifyOptions",
    "ban_list",
    "census",
    "check_repair",
    "diff",
    "examine",
    "lint",
    "repair",
    "scan",
]
