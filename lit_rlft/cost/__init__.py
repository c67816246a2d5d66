"""What a run spends, and who pays."""
