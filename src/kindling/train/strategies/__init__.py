"""How workers agree. Each strategy is a frozen settings object with a few pure hooks; torch only, no Spark."""

from kindling.train.strategies.all_reduce import AllReduce
from kindling.train.strategies.base import Replica, State, Strategy
from kindling.train.strategies.comms import Comms, GroupComms, InProcessComms, Pending, SoloComms
from kindling.train.strategies.diloco import DiLoCo
from kindling.train.strategies.downpour import Downpour
from kindling.train.strategies.mail import Mail
from kindling.train.strategies.parameter_averaging import ParameterAveraging
from kindling.train.strategies.shared_memory import SharedMemoryComms
from kindling.train.strategies.threshold_sharing import ThresholdSharing

STRATEGIES: dict[str, type[Strategy]] = {
    "allreduce": AllReduce,
    "averaging": ParameterAveraging,
    "diloco": DiLoCo,
    "downpour": Downpour,
    "threshold": ThresholdSharing,
}
"""Every strategy by the name it has on the command line and in `run.json`."""

__all__ = [
    "STRATEGIES",
    "AllReduce",
    "Comms",
    "DiLoCo",
    "Downpour",
    "GroupComms",
    "InProcessComms",
    "Mail",
    "ParameterAveraging",
    "Pending",
    "Replica",
    "SharedMemoryComms",
    "SoloComms",
    "State",
    "Strategy",
    "ThresholdSharing",
]
