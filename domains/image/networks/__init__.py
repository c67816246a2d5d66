"""Networks that look at images: feature networks and InceptionV3."""
