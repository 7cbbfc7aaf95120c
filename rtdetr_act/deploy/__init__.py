"""From a trained network to the chip: fold activations, export, and tell what a target runs and what it costs."""
