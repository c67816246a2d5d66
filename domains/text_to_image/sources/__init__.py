"""Where prompts come from: files of records or of lines."""
