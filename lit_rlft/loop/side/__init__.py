"""Work beside the main thread: rewards in side processes or threads while sampling goes on."""
