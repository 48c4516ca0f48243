"""Keras callbacks that run between steps and epochs."""
