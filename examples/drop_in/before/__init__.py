"""The users' own scripts, before vqssl."""
