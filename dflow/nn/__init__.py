"""Networks that have never heard of flows."""
