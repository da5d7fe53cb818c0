"""What the methods of this folder are made of: deltas, matrices of a form, and how they start."""
