"""`headwater demo`: wrong labels, the mistakes they cause, and the way back from one to the other."""

from headwater.demo.experiment import Findings, Settings, explore
from headwater.demo.methods import METHODS
from headwater.demo.story import report, tell

__all__ = ["METHODS", "Findings", "Settings", "explore", "report", "tell"]
