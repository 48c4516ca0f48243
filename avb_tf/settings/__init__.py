"""Settings with their defaults and checks: plain values, without TensorFlow."""
