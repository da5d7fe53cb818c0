"""Initial values of adapters from data."""
