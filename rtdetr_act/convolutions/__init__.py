"""Convolutions that take the place of others: the companion of the activations."""
