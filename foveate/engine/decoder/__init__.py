"""Dropping visual tokens between decoder layers."""
