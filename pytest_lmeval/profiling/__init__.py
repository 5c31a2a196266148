"""Time steps, and count their operations and bytes."""
