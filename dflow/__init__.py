"""dflow."""
