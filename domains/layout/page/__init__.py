"""What is known of a page: its classes, and what can be measured of it."""
