"""ROSE: the fine-tuning API on your own hardware."""

__version__ = "0.1.0"
