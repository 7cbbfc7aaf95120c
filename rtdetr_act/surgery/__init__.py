"""Find activations and convolutions in a network, replace them by a plan, undo it, and initialise the result."""
