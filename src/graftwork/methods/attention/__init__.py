"""Base methods, one file each."""
