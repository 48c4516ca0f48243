"""Keras callbacks: what happens between steps."""
