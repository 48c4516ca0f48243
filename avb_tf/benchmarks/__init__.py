"""How fast a step, AIS and several replicas are, and how their costs grow."""
