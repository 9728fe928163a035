"""The playground: a page on this machine that writes with and without edits of SAE features, and with a control."""

from workbench.serve.playground import Playground

__all__ = ["Playground"]
