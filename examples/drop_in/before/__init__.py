"""The same scripts without vqssl."""
