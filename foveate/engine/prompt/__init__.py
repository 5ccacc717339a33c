"""From a prompt to a shorter one: its layout, and the positions of its tokens."""
