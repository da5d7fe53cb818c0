"""Methods that mix other adapters, where these act: `fuse(...)` and `route(..., by=...)` of the expressions ask them for weights."""
