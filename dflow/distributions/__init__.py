"""Laws with exact likelihood."""
