"""Layouts: labelled boxes on a page or screen, from a page grammar to PubLayNet and RICO."""
