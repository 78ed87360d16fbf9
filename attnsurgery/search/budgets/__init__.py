"""Costs of candidates: counted exactly, measured, calibrated and predicted."""
