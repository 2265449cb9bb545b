"""What `ASKModule` can train with; one loss a file."""

from ask_lightning.losses.reliability_ot import ReliabilityOTLoss

__all__ = ["ReliabilityOTLoss"]
