"""Let a swap start from what the network already knows: fitted, refitted, calibrated."""
