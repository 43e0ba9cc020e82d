"""Contains scripts that time or run other tools on the same shapes and print JSON lines."""
