"""Pictures of what methods keep, and curves of what it costs."""
