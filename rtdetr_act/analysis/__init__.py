"""What activations cost and do: operations, memory, curves, gradients, what they learned. Takes model objects."""
