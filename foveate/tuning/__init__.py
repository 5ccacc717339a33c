"""Searching for settings of methods on a calibration set."""
