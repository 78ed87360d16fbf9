"""The costs of candidates: exact ones, and latencies that are calibrated and predicted."""
