"""Estimates of log p(x) of a trained model, which do not use the adversary."""
