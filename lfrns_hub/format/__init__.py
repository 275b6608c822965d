"""Files of strangers: how much memory what they say may take."""
