"""Posteriors of users' own models: fits, baselines and their comparison."""
