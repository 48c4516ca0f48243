"""Settings with their defaults and checks, as plain values without TensorFlow."""
