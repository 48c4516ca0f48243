"""Every setting with its default and its check: plain values, no TensorFlow."""
