"""Calibration: inputs are streamed through the float model once, and statistics become scales."""
