"""Manta: check, plan, submit, scale and remember work on one Ray cluster."""

__version__ = "0.1.0"
