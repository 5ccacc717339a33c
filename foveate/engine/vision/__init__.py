"""From pixels to fewer visual tokens."""
