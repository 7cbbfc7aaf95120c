"""Cost and behaviour of activations in a model object: operations, memory, curves, gradients, learned parameters."""
