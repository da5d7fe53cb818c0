"""Methods that leave out a part of the backbone's own work: a module for some tokens, or a whole block."""
