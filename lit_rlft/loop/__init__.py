"""One round, piece by piece: draw, score, update, remember, log."""
