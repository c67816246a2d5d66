"""The script that trains the embedded encoders."""
