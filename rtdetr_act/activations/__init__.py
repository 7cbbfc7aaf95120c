"""The zoo: one file per family of activations, and `registry` with their names; importing this imports no torch."""
