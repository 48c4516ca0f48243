"""Benchmarks of a step, of AIS and of several replicas, and of how their costs grow."""
