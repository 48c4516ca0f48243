"""Exported models: their signatures and files, and how to load them without TensorFlow's Python.

`protos`, `saved_model` and `check` import neither TensorFlow nor Keras, so that a check or a client
sees what a server sees. `signatures` and `writing` make what they load.
"""
