"""Calibration inputs and training sets made from the model itself."""
