"""Amortised posteriors: one network for every data set of a user's model."""
