"""The script that trains the embedded feature networks."""
