"""Let a swap start from what the network already knows: blended in, fitted, calibrated, taught by the one before."""
