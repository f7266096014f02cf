"""Networks, independent of flows."""
