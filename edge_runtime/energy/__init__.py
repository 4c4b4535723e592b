"""Readings → joules: energy of an answer, a model of power for boards without a sensor, and its calibration."""
