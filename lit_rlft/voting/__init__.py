"""Questions to a person, the file of votes, and the scores that follow from votes."""
