"""Prepare trained networks for deployment: fold activations, make them exportable, and check target support."""
