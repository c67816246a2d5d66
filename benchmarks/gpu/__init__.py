"""What this project reaches on a GPU: one command, part by part, and a table of the results."""
