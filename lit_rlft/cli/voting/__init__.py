"""`lit-rlft vote`: a local page on which a person compares samples."""
