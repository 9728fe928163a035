from .backends import FileJudge as FileJudge
from .backends import HTTPJudge as HTTPJudge
from .backends import LogProbJudge as LogProbJudge
