"""What methods share: scoring, selection, merging, inflection points, schedules, plans."""
