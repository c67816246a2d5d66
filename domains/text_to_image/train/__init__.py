"""Scripts that train the embedded models of the shapes world."""
