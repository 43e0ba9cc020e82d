"""What a user would pick instead, timed on the same shapes; each prints JSON lines."""
