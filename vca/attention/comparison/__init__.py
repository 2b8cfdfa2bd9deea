"""Published attentions to compare VCA with, one per file."""
