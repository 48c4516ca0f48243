"""Exported models: signatures, files, and a loader without TensorFlow's Python package.

`protos`, `saved_model` and `check` import neither TensorFlow nor Keras, so a check or a client sees
exactly what a server sees. `signatures` and `writing` create the exports.
"""
