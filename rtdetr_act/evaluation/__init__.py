"""Scores and their uncertainty: average precision from boxes, the bootstrap over images, tests over seeds."""
