"""One file per activation, the protocol that each follows, and the registry of their names."""
