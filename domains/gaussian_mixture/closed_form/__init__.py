"""What is known of Gaussian mixtures in closed form."""
