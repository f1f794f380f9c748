"""How workers agree. Each strategy is a frozen settings object with a few pure hooks; torch only, no Spark."""

from kindling.train.strategies.all_reduce import AllReduce
from kindling.train.strategies.base import Replica, State, Strategy
from kindling.train.strategies.comms import Comms, GroupComms, InProcessComms, SoloComms
from kindling.train.strategies.parameter_averaging import ParameterAveraging
from kindling.train.strategies.shared_memory import SharedMemoryComms

STRATEGIES: dict[str, type[Strategy]] = {"allreduce": AllReduce, "averaging": ParameterAveraging}
"""Every strategy by the name it has on the command line and in `run.json`."""

__all__ = [
    "STRATEGIES",
    "AllReduce",
    "Comms",
    "GroupComms",
    "InProcessComms",
    "ParameterAveraging",
    "Replica",
    "SharedMemoryComms",
    "SoloComms",
    "State",
    "Strategy",
]
