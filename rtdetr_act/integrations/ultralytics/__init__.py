"""Ultralytics: hooks, models and data sets by name, training, export."""
