"""LLM interpretability and steering: an edit provably happened where it was asked, or it raises.

```
import workbench as wb
```
Names are imported when they are first used, so that the import itself costs nothing.
"""

from workbench.core.surface import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
