from .linear import Probe as Probe
from .linear import ProbeOptions as ProbeOptions
from .linear import fit_probe as fit_probe
from .linear import mean_pool as mean_pool
