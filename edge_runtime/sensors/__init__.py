"""Boards → readings. Nothing here knows of models."""
