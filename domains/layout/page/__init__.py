"""Pages: the classes of their elements, and measures of them."""
