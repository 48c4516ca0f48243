"""The posterior of a user's own model: fits, baselines and their comparison."""
