"""Studies on the pocket model, each a module that runs by itself."""
