"""The script that makes the embedded molecules."""
